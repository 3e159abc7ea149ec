"""Reads and runs `cases.yaml`: the questions that a policy set must answer as written."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import yaml

from server.errors import ConfigError
from server.policy.cedar import PolicySet, Question
from server.policy.permissions import Permission, covers
from server.types import Obligations

if TYPE_CHECKING:
    from pathlib import Path

    from server.types import Decision

_QUESTION_FIELDS = frozenset(Question._fields)
_OBLIGATION_FIELDS = frozenset(field.name for field in fields(Obligations))
_LISTS = frozenset({"groups", "scopes"})


@dataclass(frozen=True, slots=True)
class Case:
    """One question and what must be answered; None where anything will do."""

    name: str
    question: Question
    is_allowed: bool
    policies: tuple[str, ...] | None
    obligations: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that was answered otherwise."""

    name: str
    problem: str


def load_cases(path: Path) -> list[Case]:
    """Read a file of cases.

    Raises:
        ConfigError: It is missing, does not parse, or holds something unknown.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The cases {path} can't be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The cases {path} are not YAML.") from error
    if not isinstance(document, dict) or set(document) - {"defaults", "cases"} or not document.get("cases"):
        raise ConfigError(f"{path} must hold 'cases', a list, and may hold 'defaults'.")
    defaults = document.get("defaults") or {}
    cases = [_parse(entry, defaults) for entry in document["cases"]]
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: two cases have one name.")
    return cases


def run_cases(policies: PolicySet, cases: list[Case]) -> list[Failure]:
    """Return the cases that are not answered as written."""
    failures = []
    for case in cases:
        problem = _compare(case, evaluate(policies, case.question))
        if problem is not None:
            failures.append(Failure(case.name, problem))
    return failures


def evaluate(policies: PolicySet, question: Question) -> Decision:
    """Answer a question as the server would, the credential's scopes included."""
    if not covers(question.scopes, question.action):
        refused = policies.ask(question._replace(groups=frozenset(), subject="nobody"))
        return type(refused)(False, f"the credential's scopes do not reach {question.action}", (), policies.digest)
    return policies.ask(question)


def parse_question(values: dict[str, Any], where: str) -> Question:
    """Read a question from names and values, as in a cases file or on the command line.

    Raises:
        ConfigError: A name is unknown or a value of the wrong kind.
    """
    unknown = set(values) - _QUESTION_FIELDS
    if unknown:
        raise ConfigError(f"{where}: unknown '{min(unknown)}'; known are {', '.join(sorted(_QUESTION_FIELDS))}.")
    given: dict[str, Any] = {"subject": "someone", "tenant": "default", "groups": [], "scopes": ["*"],
                             "method": "api_key"} | values  # fmt: skip
    for name in _LISTS:
        if not isinstance(given[name], list) or not all(isinstance(one, str) for one in given[name]):
            raise ConfigError(f"{where}: '{name}' must be a list of texts.")
        given[name] = frozenset(given[name])
    if given.get("action") not in frozenset(Permission):
        raise ConfigError(f"{where}: 'action' must be one of {', '.join(Permission)}.")
    for name, value in given.items():
        wanted: type = {"num_tokens": int, "hour": int, "weekday": int, "stream": bool}.get(name, str)
        if name not in _LISTS and (type(value) is not wanted):
            raise ConfigError(f"{where}: '{name}' must be of type {wanted.__name__}.")
    return Question(**given)


def _parse(entry: Any, defaults: dict[str, Any]) -> Case:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError("Every case is a mapping with a 'name'.")
    where = f"case '{entry['name']}'"
    rest = {key: value for key, value in entry.items() if key not in ("name", "expect", "policies", "obligations")}
    if entry.get("expect") not in ("allow", "deny"):
        raise ConfigError(f"{where}: 'expect' must be allow or deny.")
    obligations = entry.get("obligations") or {}
    if not isinstance(obligations, dict) or set(obligations) - _OBLIGATION_FIELDS:
        raise ConfigError(f"{where}: obligations are {', '.join(sorted(_OBLIGATION_FIELDS))}.")
    policies = entry.get("policies")
    question = parse_question(defaults | rest, where)
    return Case(
        entry["name"], question, entry["expect"] == "allow", None if policies is None else tuple(sorted(policies)),
        obligations,
    )  # fmt: skip


def _compare(case: Case, decision: Decision) -> str | None:
    if decision.allowed != case.is_allowed:
        expected = "allowed" if case.is_allowed else "refused"
        return f"expected to be {expected}, but: {decision.reason}"
    if case.policies is not None and decision.policies != case.policies:
        return f"expected to be decided by {', '.join(case.policies)}, but it was {', '.join(decision.policies)}"
    for name, value in case.obligations.items():
        found = getattr(decision.obligations, name)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            return f"expected {name} to be {value!r}, but it is {found!r}"
    return None
