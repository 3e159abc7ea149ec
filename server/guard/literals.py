"""Which literal words a pattern cannot match without: one look for them saves running the pattern at all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import re

_c: Any = None
_p: Any = None
try:
    _c, _p = importlib.import_module("re._constants"), importlib.import_module("re._parser")
except ImportError:  # the parser moved: without it every pattern is simply run
    _c = _p = None

_MIN_CHARS = 2
_MAX_WORDS = 40


def required_words(pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Return lower-case words of which every match of `pattern` holds at least one; empty where nothing can be said."""
    if _p is None:
        return ()
    words = _of_sequence(list(_p.parse(pattern.pattern, pattern.flags)))
    return tuple(sorted(words)) if words else ()


def _of_sequence(items: list[Any]) -> frozenset[str] | None:
    best: frozenset[str] | None = None
    run: list[str] = []
    for op, value in [*items, (None, None)]:
        if op is _c.LITERAL:
            run.append(chr(value).lower())
            continue
        best = _better(best, frozenset({"".join(run)}) if len(run) >= _MIN_CHARS else None)
        run = []
        if op is not None:
            best = _better(best, _of_item(op, value))
    return best


def _of_item(op: Any, value: Any) -> frozenset[str] | None:
    if op is _c.SUBPATTERN:
        return _of_sequence(list(value[3]))
    if op is _c.BRANCH:
        parts = [_of_sequence(list(branch)) for branch in value[1]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        union = frozenset().union(*known)
        return union if len(union) <= _MAX_WORDS else None
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT, _c.POSSESSIVE_REPEAT) and value[0] >= 1:
        return _of_sequence(list(value[2]))
    if op is _c.ATOMIC_GROUP:
        return _of_sequence(list(value))
    return None


def _better(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda words: (min(map(len, words)), -len(words)))
