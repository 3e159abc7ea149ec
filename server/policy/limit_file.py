"""Reads `limits.yaml`: what each key, subject, team, tenant and model may use, and what tokens cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import yaml

from server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

DIMENSIONS = ("key", "subject", "team", "tenant", "model")
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Rule:
    """What one account may use; None is no limit. Cost is in millionths of the prices' currency."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    cost_micros_per_day: int | None = None
    cost_micros_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """Millionths of the currency for one token; equal to whole units for a million."""

    prompt_micros: float = 0.0
    completion_micros: float = 0.0

    def cost_micros(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Return what this many tokens cost, rounded up."""
        exact = prompt_tokens * self.prompt_micros + completion_tokens * self.completion_micros
        return -int(-exact // 1)


@dataclass(frozen=True, slots=True)
class LimitBook:
    """All limits: `rules` by dimension and name, `""` for every account that is not named.

    `digest` is the file's SHA-256 in lowercase hex; empty for rules that came from no file.
    """

    rules: dict[tuple[str, str], Rule]
    prices: dict[str, Price]
    max_wait_s: float = 10.0
    digest: str = ""

    def rule(self, dimension: str, name: str) -> Rule | None:
        """Return the rule of one account: its own, else that of its dimension, else None.

        Subjects and teams are `tenant/name`; a rule may name them so, or without the tenant for those of every tenant.
        """
        bare = name.partition("/")[2]
        return self.rules.get((dimension, name)) or self.rules.get((dimension, bare)) or self.rules.get((dimension, ""))

    def price(self, model: str) -> Price:
        """Return what a model's tokens cost."""
        return self.prices.get(model) or self.prices.get("*") or Price()


def load_limits(path: Path) -> LimitBook:
    """Read a limits file.

    Raises:
        ConfigError: It is missing, does not parse, or holds something unknown.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The limits file {path} can't be read ({error.strerror}).") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"The limits file {path} is larger than {MAX_FILE_BYTES} bytes.")
    try:
        return replace(parse_limits(yaml.safe_load(content)), digest=hashlib.sha256(content).hexdigest())
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"The limits file {path} is not YAML.") from error


def parse_limits(document: Any) -> LimitBook:
    """Read the parsed form of a limits file.

    Raises:
        ConfigError: It holds something unknown or malformed.
    """
    top = _mapping(document, "the limits file", {"prices", "limits", "max_wait_s"})
    rules: dict[tuple[str, str], Rule] = {}
    entries = top.get("limits", [])
    if not isinstance(entries, list):
        raise ConfigError("limits must be a list of rules.")
    money = {"cost_per_day", "cost_per_month"}
    counts = {field.name for field in fields(Rule)} - {"cost_micros_per_day", "cost_micros_per_month"}
    for number, entry in enumerate(entries, start=1):
        where = f"limits, rule {number}"
        rule = _mapping(entry, where, {"per", "name"} | money | counts)
        dimension, name = rule.get("per"), rule.get("name", "")
        if dimension not in DIMENSIONS or not isinstance(name, str):
            raise ConfigError(f"{where}: 'per' must be one of {', '.join(DIMENSIONS)}, 'name' a text.")
        if (dimension, name) in rules:
            raise ConfigError(f"{where}: there is a rule for this {dimension} already.")
        values: dict[str, int] = {}
        for field in counts & rule.keys():
            values[field] = _whole(rule[field], f"{where}: {field}")
        for field in money & rule.keys():
            values[field.replace("cost_", "cost_micros_")] = int(_amount(rule[field], f"{where}: {field}") * 1_000_000)
        if not values:
            raise ConfigError(f"{where}: it limits nothing.")
        rules[(dimension, name)] = Rule(**values)
    prices: dict[str, Price] = {}
    for model, value in _mapping(top.get("prices", {}), "prices", None).items():
        price = _mapping(value, f"prices of {model}", {"prompt", "completion"})
        prices[str(model)] = Price(
            _amount(price.get("prompt", 0), f"prices of {model}: prompt"),
            _amount(price.get("completion", 0), f"prices of {model}: completion"),
        )
    return LimitBook(rules, prices, _amount(top.get("max_wait_s", 10), "max_wait_s"))


def _mapping(value: Any, where: str, known: set[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping.")
    unknown = set() if known is None else {str(name) for name in value} - known
    if unknown:
        raise ConfigError(f"{where}: unknown '{min(unknown)}'; known are {', '.join(sorted(known or ()))}.")
    return value


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**15:
        raise ConfigError(f"{where} must be a whole number of at least 1.")
    return value


def _amount(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 10**12:
        raise ConfigError(f"{where} must be a number of at least 0.")
    return float(value)
