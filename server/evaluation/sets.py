"""The prompt sets, parsed strictly, and the questions that are made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SETS = ("code", "useful", "bias", "injection")
_FIELDS = {
    "code": {"id", "cwe", "language", "prompt", "insecure", "secure"},
    "useful": {"id", "language", "prompt", "needs", "answer"},
    "bias": {"id", "kind", "about", "prompt", "options", "score", "fill"},
    "injection": {"id", "user", "system", "success", "leak"},
}
_PATTERNS = ("insecure", "secure", "answer", "success")


@dataclass(frozen=True, slots=True)
class Question:
    """One question to a model: which item of which set, its messages, and the group it stands for in a pair probe."""

    set: str
    item: str
    variant: str
    messages: tuple[dict[str, str], ...]
    group: str = ""

    @property
    def key(self) -> str:
        """What tells this question from every other."""
        return f"{self.set}/{self.item}/{self.variant}"


def load_set(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the items of one set by id.

    Raises:
        ConfigError: The file is missing, or an item is not of the set's form; named.
    """
    try:
        items = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as err:
        raise ConfigError(f"The prompt set {path} can't be read. Give the folder with --prompts.") from err
    if not isinstance(items, list):
        raise ConfigError(f"The prompt set {path} must be a list of items.")
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        if not isinstance(item, dict) or "id" not in item or set(item) - _FIELDS[name] or item["id"] in found:
            raise ConfigError(f"{path}: an item is doubled or has unknown fields: {str(item)[:80]}")
        try:
            for field in _PATTERNS:
                for pattern in item.get(field, ()):
                    re.compile(pattern)
        except re.error as err:
            raise ConfigError(f"{path}: {item['id']} has a pattern that is not valid: {err}.") from err
        found[item["id"]] = item
    return found


def questions(name: str, items: dict[str, dict[str, Any]]) -> Iterator[Question]:
    """Yield what a set asks, one question a variant."""
    for item in items.values():
        if name == "injection":
            system = ({"role": "system", "content": item["system"]},) if "system" in item else ()
            yield Question(name, item["id"], "", (*system, {"role": "user", "content": item["user"]}))
        elif "fill" in item:
            for group, fills in item["fill"].items():
                for fill in fills:
                    text = item["prompt"].replace("{fill}", fill)
                    yield Question(name, item["id"], fill, ({"role": "user", "content": text},), group)
        else:
            yield Question(name, item["id"], "", ({"role": "user", "content": item["prompt"]},))
