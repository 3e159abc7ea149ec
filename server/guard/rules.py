# ruff: noqa: E501  # a pattern is read whole
"""The rules of one language, loaded from `configs/guard/rules/`: data only, checked when loaded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from server.errors import ConfigError
from server.guard.bounds import bounded
from server.guard.literals import Needs, required_words
from server.guard.openings import opened

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
# What a tainted value may be dangerous for; a sanitizer takes some of these away.
DANGERS = (
    "command", "sql", "code", "path", "html", "url", "redirect", "ldap", "xpath", "log", "regex", "deserialize", "format", "header",
    "template", "xml", "nosql", "size", "prototype", "mail", "error", "import", "random", "fields",
)  # fmt: skip
BITS = {name: 1 << i for i, name in enumerate(DANGERS)}
ALL = (1 << len(DANGERS)) - 1 & ~BITS["random"]  # input is not random, and no check of its form makes it so
MAX_NAMES = 20_000
_SEVERITIES = frozenset({"low", "medium", "high", "critical"})


@dataclass(frozen=True, slots=True)
class Rule:
    """What every kind of rule says of its finding."""

    id: str
    cwe: str
    severity: str
    message: str
    fix: str


@dataclass(frozen=True, slots=True)
class Sink:
    """A call or an assignment that a tainted value must not reach.

    `args` are positions or names (empty: any argument); `strong` asks for a value that came from outside, not just from a
    parameter; `built` asks for a text put together from parts. `when` and `unless` look at the whole call's text, the
    same with `_function` at the function around it, its decorators included, and with `_file` at the whole file.
    """

    rule: Rule
    danger: int
    call: re.Pattern[str] | None
    assign: re.Pattern[str] | None
    args: tuple[int | str, ...]
    strong: bool
    built: bool
    receiver: bool
    when: re.Pattern[str] | None
    unless: re.Pattern[str] | None
    unless_function: re.Pattern[str] | None
    when_function: re.Pattern[str] | None
    unless_file: re.Pattern[str] | None
    when_file: re.Pattern[str] | None


@dataclass(frozen=True, slots=True)
class Pattern:
    """A call, a node or a piece of text that is wrong by itself; `has` and `lacks` look at its scope.

    `unchecked`: the variable that the match calls `v` is compared with nothing in the scope. `greater`: the number that it calls
    `v` is greater than that of this other group. `nested`: the regular expression that the match begins really is ambiguous.
    `assembled`: the SQL that is run where the match ends has a caller's text in it (`assembled.py`), which is what is reported.
    `foreign`: the shell variable that it calls `v` (without one: some variable that it names) is set to no fixed text and held
    against no pattern in the file; an environment variable counts as fixed, unless this is `unset`. A match that begins far
    before the harm calls that piece `at`: it is what is reported, and where the scope is looked for.
    """

    rule: Rule
    call: re.Pattern[str] | None
    match: re.Pattern[str] | None
    masked: bool
    scope: str
    args: re.Pattern[str] | None
    args_lack: re.Pattern[str] | None
    has: tuple[re.Pattern[str], ...]
    lacks: tuple[re.Pattern[str], ...]
    file_has: re.Pattern[str] | None
    file_lacks: re.Pattern[str] | None
    needs: Needs
    unchecked: bool
    greater: int | None
    nested: bool
    foreign: str
    assembled: bool


# Whether it is a source or a weak one, what it cleans, whether it hands on or makes canonical, and its sinks.
Called = tuple[bool, bool, int, bool, bool, list[Sink]]


class Remembered(dict[str, T]):
    """What was found for each name; bounded, for code calls the same names over and over, and hostile code new ones."""

    def __init__(self, find: Callable[[str], T]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> T:
        """Find it, and keep it."""
        if len(self) >= MAX_NAMES:
            self.clear()
        found = self[name] = self._find(name)
        return found


@dataclass(slots=True)
class Language:
    """Everything known of one language."""

    name: str
    sources: re.Pattern[str] | None = None
    file_sources: list[tuple[re.Pattern[str], re.Pattern[str]]] = field(default_factory=list)
    source_dangers: list[tuple[re.Pattern[str], int]] = field(default_factory=list)
    harmless_sources: re.Pattern[str] | None = None
    weak_sources: re.Pattern[str] | None = None
    handler: re.Pattern[str] | None = None
    strong_param: re.Pattern[str] | None = None
    safe_type: re.Pattern[str] | None = None
    ignored_param: re.Pattern[str] | None = None
    sanitizers: list[tuple[re.Pattern[str], int]] = field(default_factory=list)
    validators: list[tuple[re.Pattern[str], int]] = field(default_factory=list)
    canonical: re.Pattern[str] | None = None
    propagators: re.Pattern[str] | None = None
    sinks: list[Sink] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    called: Remembered[Called] = field(init=False)
    call_patterns: Remembered[list[Pattern]] = field(init=False)
    assigned: Remembered[list[Sink]] = field(init=False)

    def __post_init__(self) -> None:
        """Let names be looked up: `called` and `call_patterns` by callee, `assigned` by the target of an assignment."""
        self.called = Remembered(self._find_called)
        self.call_patterns = Remembered(
            lambda callee: [p for p in self.patterns if p.call is not None and p.call.search(callee)]
        )
        self.assigned = Remembered(
            lambda target: [sink for sink in self.sinks if sink.assign is not None and sink.assign.search(target)]
        )

    def _find_called(self, callee: str) -> Called:
        cleans = 0
        for pattern, mask in self.sanitizers:
            if pattern.search(callee):
                cleans |= mask
        return (
            self.sources is not None and self.sources.search(callee + "(") is not None,
            self.weak_sources is not None and self.weak_sources.search(callee + "(") is not None,
            cleans,
            self.propagators is not None and self.propagators.search(callee) is not None,
            self.canonical is not None and self.canonical.search(callee) is not None,
            [sink for sink in self.sinks if sink.call is not None and sink.call.search(callee)],
        )


def rules_folder() -> Path:
    """Return where the rules lie: the operator's folder, or the one that ships with the source."""
    given = os.environ.get("STRONGROOM_GUARD_RULES")
    if given:
        return Path(given)
    return Path(__file__).resolve().parent.parent.parent / "configs" / "guard" / "rules"


@lru_cache(maxsize=32)
def load_language(name: str) -> Language | None:
    """Return the rules for `name`, or None where there are none.

    Raises:
        ConfigError: A rule file is missing a field, has an unknown one, or a pattern that does not compile.
    """
    folder = rules_folder()
    if not folder.is_dir():
        raise ConfigError(f"the guard's rules are not at {folder}: set the guard's rules folder, or install them there")
    language = Language(name)
    found = False
    weaknesses = _load(folder / "weaknesses.yml")
    for path in (folder / f"{name}.yml", *sorted((folder / name).glob("*.yml"))):
        if path.is_file():
            found = True
            _merge(language, path, weaknesses, folder)
    return language if found else None


def _load(path: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506  # the safe loader, in C where it is built
    except (OSError, yaml.YAMLError) as err:
        raise ConfigError(f"{path} is not a readable rule file: {type(err).__name__}") from err
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping at the top")
    return value


_TOP = frozenset(
    {
        "include", "sources", "file_sources", "source_dangers", "harmless_sources", "weak_sources", "handler", "strong_param", "safe_type", "ignored_param", "sanitizers", "validators", "canonical",
        "propagators", "flows", "patterns",
    }
)  # fmt: skip


def _merge(language: Language, path: Path, weaknesses: dict[str, Any], folder: Path) -> None:
    data = _load(path)
    unknown = set(data) - _TOP
    if unknown:
        raise ConfigError(f"{path}: unknown field {sorted(unknown)[0]!r}; expected one of {', '.join(sorted(_TOP))}")
    for name in data.get("include", []):
        _merge(language, folder / f"{name}.yml", weaknesses, folder)
    for name in (
        "sources",
        "harmless_sources",
        "weak_sources",
        "handler",
        "strong_param",
        "safe_type",
        "ignored_param",
        "canonical",
        "propagators",
    ):
        if name in data:
            setattr(language, name, _regex(path, data[name]))
    for target, entries in (
        (language.sanitizers, data.get("sanitizers", {})),
        (language.validators, data.get("validators", {})),
    ):
        for dangers, patterns in entries.items():
            target += [(_compile(path, pattern), _mask(path, dangers)) for pattern in patterns]
    for entry in data.get("file_sources", []):
        language.file_sources.append((_regex(path, entry["file_has"]), _regex(path, entry["match"])))
    for entry in data.get("source_dangers", []):  # the first that fits says what a source can do; the others can do all
        dangers = _mask(path, entry.get("dangers", "all")) & ~_mask(path, entry.get("except", ""))
        language.source_dangers.append((_regex(path, entry["match"]), dangers))
    for entry in data.get("flows", []):
        language.sinks += _sinks(path, entry, weaknesses)
    language.patterns += [_pattern(path, entry, weaknesses) for entry in data.get("patterns", [])]


def _rule(path: Path, entry: dict[str, Any], weaknesses: dict[str, Any]) -> Rule:
    try:
        identifier, cwe = entry.pop("id"), entry.pop("cwe")
    except KeyError as err:
        raise ConfigError(f"{path}: a rule has no {err.args[0]!r}") from err
    known = weaknesses.get(f"CWE-{cwe}", {})
    severity = entry.pop("severity", known.get("severity", "medium"))
    message, fix = entry.pop("message", known.get("message")), entry.pop("fix", known.get("fix", ""))
    if severity not in _SEVERITIES or message is None:
        raise ConfigError(f"{path}: rule {identifier}: no message for CWE-{cwe}, or a severity that is none")
    return Rule(identifier, f"CWE-{cwe}", severity, message, fix)


def _sinks(path: Path, given: dict[str, Any], weaknesses: dict[str, Any]) -> list[Sink]:
    entry = dict(given)
    rule = _rule(path, entry, weaknesses)
    danger = _mask(path, entry.pop("danger"))
    unless_file, when_file = entry.pop("unless_file", None), entry.pop("when_file", None)  # of the whole rule
    sinks = []
    for given_sink in entry.pop("sinks"):
        sink = {"call": given_sink} if isinstance(given_sink, str) else dict(given_sink)
        args = sink.pop("args", [])
        made = Sink(
            rule,
            danger,
            _optional(path, sink.pop("call", None)),
            _optional(path, sink.pop("assign", None)),
            tuple(args if isinstance(args, list) else [args]),
            bool(sink.pop("strong", False)),
            bool(sink.pop("built", False)),
            bool(sink.pop("receiver", False)),
            _optional(path, sink.pop("when", None)),
            _optional(path, sink.pop("unless", None)),
            _optional(path, sink.pop("unless_function", None)),
            _optional(path, sink.pop("when_function", None)),
            _optional(path, sink.pop("unless_file", unless_file)),
            _optional(path, sink.pop("when_file", when_file)),
        )
        _nothing_left(path, rule, sink)
        sinks.append(made)
    _nothing_left(path, rule, entry)
    return sinks


def _pattern(path: Path, given: dict[str, Any], weaknesses: dict[str, Any]) -> Pattern:
    entry = dict(given)
    rule = _rule(path, entry, weaknesses)
    match = _optional(path, entry.pop("match", None))
    has = tuple(_compile(path, p) for p in _listed(entry.pop("has", [])))
    file_has = _optional(path, entry.pop("file_has", None))
    made = Pattern(
        rule,
        _optional(path, entry.pop("call", None)),
        match,
        bool(entry.pop("masked", False)),
        entry.pop("scope", "function"),
        _optional(path, entry.pop("args", None)),
        _optional(path, entry.pop("args_lack", None)),
        has,
        tuple(_compile(path, p) for p in _listed(entry.pop("lacks", []))),
        file_has,
        _optional(path, entry.pop("file_lacks", None)),
        required_words(p for p in (match, file_has, *has) if p is not None),
        bool(entry.pop("unchecked", False)),
        entry.pop("greater", None),
        bool(entry.pop("nested", False)),
        _foreign(path, rule, entry.pop("foreign", False)),
        bool(entry.pop("assembled", False)),
    )
    _nothing_left(path, rule, entry)
    if (made.call is None) == (made.match is None):
        raise ConfigError(f"{path}: rule {rule.id}: expected one of 'call' and 'match'")
    about_one = made.unchecked or made.foreign == "unset" or made.greater is not None
    if about_one and (match is None or "v" not in match.groupindex):
        raise ConfigError(
            f"{path}: rule {rule.id}: 'unchecked', 'greater' and 'foreign: unset' ask for a 'match' with a group 'v'"
        )
    if made.foreign and match is None:
        raise ConfigError(f"{path}: rule {rule.id}: 'foreign' asks for a 'match'")
    return made


def _foreign(path: Path, rule: Rule, value: Any) -> str:
    if value in (False, True, "unset"):
        return {False: "", True: "any"}.get(value, "unset")
    raise ConfigError(f"{path}: rule {rule.id}: 'foreign' is true or unset")


def _nothing_left(path: Path, rule: Rule, entry: dict[str, Any]) -> None:
    if entry:
        raise ConfigError(f"{path}: rule {rule.id}: unknown field {sorted(entry)[0]!r}")


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _mask(path: Path, dangers: str) -> int:
    if dangers == "all":
        return ALL
    mask = 0
    for name in dangers.split():
        if name not in BITS:
            raise ConfigError(f"{path}: unknown danger {name!r}; expected one of {', '.join(DANGERS)}")
        mask |= BITS[name]
    return mask


def _regex(path: Path, value: str | list[str]) -> re.Pattern[str]:
    return _compile(path, value if isinstance(value, str) else "|".join(value))


def _optional(path: Path, value: str | list[str] | None) -> re.Pattern[str] | None:
    return None if value is None else _regex(path, value)


def _compile(path: Path, pattern: str) -> re.Pattern[str]:
    flags = re.MULTILINE
    for mark, flag in (("(?i)", re.IGNORECASE), ("(?s)", re.DOTALL), ("(?m)", re.MULTILINE), ("(?im)", re.IGNORECASE)):
        if mark in pattern:  # anywhere in a rule they mean the whole of it
            pattern, flags = pattern.replace(mark, ""), flags | flag
    try:
        pattern = bounded(pattern)
        return re.compile(pattern if flags & re.IGNORECASE else opened(pattern), flags)
    except re.error as err:
        raise ConfigError(f"{path}: the pattern {pattern!r} does not compile: {err}") from err
