"""Which literal words a pattern cannot match without: one look for them saves running the pattern at all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable

_c: Any = None
_p: Any = None
try:
    _c, _p = importlib.import_module("re._constants"), importlib.import_module("re._parser")
except ImportError:  # the parser moved: without it every pattern is simply run
    _c = _p = None

Needs = tuple[tuple[str, ...], ...]
_MIN_CHARS = 2
_MAX_WORDS = 40


def required_words(patterns: Iterable[re.Pattern[str]]) -> Needs:
    """Return sets of lower-case words: a text that all `patterns` match holds at least one word of each set.

    The set that says most stands first, for most texts lack it.
    """
    if _p is None:
        return ()
    needs = {need for p in patterns for need in _of_sequence(list(_p.parse(p.pattern, p.flags)))}
    return tuple(tuple(sorted(need)) for need in sorted(needs, key=lambda n: (*_worth(n), sorted(n)), reverse=True))


def can_match(needs: Needs, low: str) -> bool:
    """Whether the lower-case text `low` holds what `required_words` says."""
    for need in needs:
        for word in need:
            if word in low:
                break
        else:
            return False
    return True


def _of_sequence(items: list[Any]) -> list[frozenset[str]]:
    needs: list[frozenset[str]] = []
    run: list[str] = []
    for op, value in [*items, (None, None)]:
        if op is _c.LITERAL:
            run.append(chr(value).lower())
            continue
        if len(run) >= _MIN_CHARS:
            needs.append(frozenset({"".join(run)}))
        run = []
        if op is not None:
            needs += _of_item(op, value)
    return needs


def _of_item(op: Any, value: Any) -> list[frozenset[str]]:
    if op is _c.SUBPATTERN:
        return _of_sequence(list(value[3]))
    if op is _c.BRANCH:
        parts = [_of_sequence(list(branch)) for branch in value[1]]
        if not all(parts):
            return []
        union = frozenset().union(*(max(part, key=_worth) for part in parts))
        return [union] if len(union) <= _MAX_WORDS else []
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT, _c.POSSESSIVE_REPEAT) and value[0] >= 1:
        return _of_sequence(list(value[2]))
    if op is _c.ATOMIC_GROUP:
        return _of_sequence(list(value))
    if op is _c.ASSERT:  # what a match looks at stands in the text as well
        return _of_sequence(list(value[1]))
    return []


def _worth(words: frozenset[str]) -> tuple[int, int]:
    return min(map(len, words)), -len(words)
