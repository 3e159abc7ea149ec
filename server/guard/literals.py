"""Which literal words a pattern cannot match without: one look for them saves running the pattern at all."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
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

_MIN_CHARS = 2
_MAX_WORDS = 40
_MAX_SPELLINGS = 24
_ZERO_WIDTH = ("AT", "ASSERT_NOT")
_GRAM_BYTES = 4
_COMMON = b"etrinsaoclud.(pmg)fbh:>_yvkwxjqz"  # from the commonest in code to the rarest


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Words of which a text must hold one: by four bytes of each, and those that have fewer."""

    words: tuple[str, ...]
    short: tuple[str, ...]
    grams: frozenset[int]
    by_gram: dict[int, list[str]]


Needs = tuple[Words, ...]
_made: dict[tuple[str, ...], Words] = {}  # the same words are the same object, so that a text is asked for them once


class Text:
    """A text in lower case that is asked for many words.

    Most are not in it. A set of all that stands in four bytes of it says so for many words at once, where a search of
    the text for each would cost more than the patterns that it saves.
    """

    def __init__(self, low: str) -> None:
        self._low = low
        self._known: dict[Words, bool] = {}
        self._short: dict[str, bool] = {}
        self._grams: set[int] = set()
        data = memoryview(low.encode("latin-1", "replace"))
        for start in range(_GRAM_BYTES):
            end = len(data) - (len(data) - start) % _GRAM_BYTES
            if end > start:
                self._grams.update(data[start:end].cast("I"))

    def holds(self, needs: Needs) -> bool:
        """Whether the text holds what `required_words` says."""
        known = self._known
        for need in needs:
            held = known.get(need)
            if held is None:
                held = known[need] = self._find(need)
            if not held:
                return False
        return True

    def _find(self, need: Words) -> bool:
        for word in need.short:
            held = self._short.get(word)
            if held is None:
                held = self._short[word] = word in self._low
            if held:
                return True
        if need.grams.isdisjoint(self._grams):
            return False
        return any(word in self._low for gram in need.grams & self._grams for word in need.by_gram[gram])


def required_words(patterns: Iterable[re.Pattern[str]]) -> Needs:
    """Return sets of lower-case words: a text that all `patterns` match holds at least one word of each set.

    The set that says most stands first, for most texts lack it.
    """
    if _p is None:
        return ()
    needs = {_shortest(need) for p in patterns for need in _of_sequence(list(_p.parse(p.pattern, p.flags)))}
    telling = [need for need in needs if not any(other != need and _implies(other, need) for other in needs)]
    ordered = sorted(telling, key=lambda n: (*_worth(n), sorted(n)), reverse=True)
    return tuple(_words(tuple(sorted(need))) for need in ordered)


def _words(words: tuple[str, ...]) -> Words:
    if words not in _made:
        by_gram: dict[int, list[str]] = {}
        for word in words:
            if len(word) >= _GRAM_BYTES:
                by_gram.setdefault(_gram(word), []).append(word)
        short = tuple(word for word in words if len(word) < _GRAM_BYTES)
        _made[words] = Words(words, short, frozenset(by_gram), by_gram)
    return _made[words]


def _gram(word: str) -> int:
    """Return the four bytes of `word` whose letters are the rarest, as a number."""
    data = word.encode("latin-1", "replace")
    parts = [data[start : start + _GRAM_BYTES] for start in range(len(data) - _GRAM_BYTES + 1)]
    rarest = max(parts, key=lambda part: sum(_COMMON.find(byte) % len(_COMMON) for byte in part))
    return int.from_bytes(rarest, sys.byteorder)


def _shortest(need: frozenset[str]) -> frozenset[str]:
    """Return `need` without words that hold another of them: whoever has `fprintf` has `printf`."""
    return frozenset(word for word in need if not any(other != word and other in word for other in need))


def _implies(need: frozenset[str], other: frozenset[str]) -> bool:
    return all(any(word in held for word in other) for held in need)


def _of_sequence(items: list[Any]) -> list[frozenset[str]]:
    needs: list[frozenset[str]] = []
    run = frozenset({""})
    for op, value in [*items, (None, None)]:
        if op is not None and str(op) in _ZERO_WIDTH:
            continue
        if op is _c.ASSERT:  # what a match looks at stands in the text as well
            needs += _of_sequence(list(value[1]))
            continue
        spelt = _spellings(op, value)
        if spelt is not None and len(run) * len(spelt) <= _MAX_SPELLINGS:
            run = frozenset(before + after for before in run for after in spelt)
            continue
        if min(map(len, run)) >= _MIN_CHARS:
            needs.append(run)
        run = frozenset({""})
        if spelt is not None and len(spelt) <= _MAX_SPELLINGS:
            run = spelt
        elif op is not None:
            needs += _of_item(op, value)
    return needs


def _spellings(op: Any, value: Any) -> frozenset[str] | None:
    """Return all that an item can match, in lower case, or None where that is too much."""
    if op is _c.LITERAL:
        return frozenset({chr(value).lower()})
    if op is _c.IN and all(kind is _c.LITERAL for kind, _ in value):
        return frozenset(chr(char).lower() for _, char in value)
    if op is _c.SUBPATTERN:
        return _spellings_of(list(value[3]))
    if op is _c.BRANCH:
        parts = [_spellings_of(list(branch)) for branch in value[1]]
        if any(part is None for part in parts):
            return None
        return _few(frozenset().union(*(part for part in parts if part is not None)))
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT) and tuple(value[:2]) == (0, 1):
        inner = _spellings_of(list(value[2]))
        return None if inner is None else inner | {""}
    return None


def _spellings_of(items: list[Any]) -> frozenset[str] | None:
    found: frozenset[str] | None = frozenset({""})
    for op, value in items:
        if str(op) in _ZERO_WIDTH or op is _c.ASSERT:
            continue
        part = _spellings(op, value)
        if found is None or part is None:
            return None
        found = _few(frozenset(before + after for before in found for after in part))
    return found


def _few(words: frozenset[str]) -> frozenset[str] | None:
    return words if len(words) <= _MAX_WORDS else None


def _of_item(op: Any, value: Any) -> list[frozenset[str]]:
    if op is _c.SUBPATTERN:
        return _of_sequence(list(value[3]))
    if op is _c.BRANCH:
        parts = [_of_sequence(list(branch)) for branch in value[1]]
        if not all(parts):
            return []
        union = _shortest(frozenset().union(*(max(part, key=_worth) for part in parts)))
        return [union] if len(union) <= _MAX_WORDS else []
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT, _c.POSSESSIVE_REPEAT) and value[0] >= 1:
        return _of_sequence(list(value[2]))
    if op is _c.ATOMIC_GROUP:
        return _of_sequence(list(value))
    return []


def _worth(words: frozenset[str]) -> tuple[int, int]:
    return min(map(len, words)), -len(words)
