r"""Patterns made to begin with a letter that can be looked for: `\bfree` is tried at every character of a text.

The engine skips to where a pattern's first characters stand, but only where they come first: a boundary before them
hides them. `free(?<=\bfree)` finds the same, some twenty times as fast; so do `(?:int|long)` with one in each part.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_OPTIONAL = re.compile(r"\(\?:([\w: ]+)\)\?(?![?+])|(\w)\?(?![?+])")
_LACKS = re.compile(r"\(\?<!((?:[\w :]|\\[^\w\s])+)\)")
_MARKS = re.compile(rf"(?:\\b|{_LACKS.pattern})*")
_COUNTS = frozenset("?*+{")
_MAX_PARTS = 40


def opened(pattern: str) -> str:
    r"""Return `pattern` with the `\b` and `(?<!new )` that its parts begin with behind the word that follows."""
    parts = _parts(pattern)
    return pattern if parts is None else "|".join(_part(part, "") for part in parts)


def _part(part: str, before: str) -> str:
    """Return one part of an alternative, behind the marks `before`; the same where nothing can be moved."""
    marks, rest = _marks(part)
    if not marks and not before and _WORD.match(part):
        return part
    before += marks
    begun = _begun(rest, before)
    if begun is not None:
        return begun
    start = re.match(r"\((?:\?:|(?!\?))", rest)
    end = _end_of_group(rest) if start else None
    if start is None or end is None or rest[end : end + 1] in _COUNTS:
        return part
    words = [word for one in _parts(rest[start.end() : end - 1]) or [] for word in _spelt(one)]
    begins = [_begun(begun_rest, before + own) for own, begun_rest in map(_marks, words)]
    if not words or len(words) > _MAX_PARTS or None in begins:
        return part
    return start[0] + "|".join(map(str, begins)) + ")" + rest[end:]


def _marks(part: str) -> tuple[str, str]:
    """Return the boundaries that `part` begins with, and the rest of it."""
    found = _MARKS.match(part)
    end = found.end() if found else 0
    return part[:end], part[end:]


def _spelt(part: str) -> list[str]:
    """Return `part` with and without what it may begin with, in the order in which they are tried."""
    found = _OPTIONAL.match(part)
    if not found:
        return [part]
    rest = _spelt(part[found.end() :])
    return [*((found[1] or found[2]) + one for one in rest), *rest]


def _begun(rest: str, marks: str) -> str | None:
    """Return `rest` with `marks` behind its first word, or None where it begins with none."""
    found = _WORD.match(rest)
    if not found:
        return None
    word = found[0][:-1] if rest[found.end() : found.end() + 1] in _COUNTS else found[0]
    if not word:
        return None
    moved = rf"(?<=\b{word})" if r"\b" in marks else ""
    moved += "".join(f"(?<!{text}{word})" for text in _LACKS.findall(marks))
    return word + moved + rest[len(word) :]


def _parts(pattern: str) -> list[str] | None:
    """Return what stands between the `|` of the outermost level, or None where a mark is not understood."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(pattern):
        char = pattern[position]
        if char == "|" and depth == 0:
            parts.append(pattern[start:position])
            start = position + 1
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return None
        position = _after(pattern, position)
    return [*parts, pattern[start:]] if depth == 0 else None


def _end_of_group(pattern: str) -> int | None:
    depth, position = 0, 0
    while position < len(pattern):
        depth += (pattern[position] == "(") - (pattern[position] == ")")
        position = _after(pattern, position)
        if depth == 0:
            return position
    return None


def _after(pattern: str, position: int) -> int:
    """Return where the mark at `position` ends: an escape, a class or one character."""
    if pattern[position] == "\\":
        return position + 2
    if pattern[position] != "[":
        return position + 1
    end = position + 1 + (pattern[position + 1 : position + 2] == "^")
    end += pattern[end : end + 1] == "]"
    while pattern[end : end + 1] not in ("]", ""):
        end += 2 if pattern[end] == "\\" else 1
    return end + 1
