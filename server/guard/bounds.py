r"""Patterns made bounded: a rule's `*` and `+` reach a limited way, so that a search is linear in the text.

A pattern that begins with `foo[^;]*` is tried at every `foo`; without an end to its reach a text of nothing but `foo`
costs its length squared. Code within the reach is matched as before.
"""

from __future__ import annotations

import re

MAX_REACH_CHARS = 3000
MAX_WORD_CHARS = 200
MAX_BLANK_CHARS = 80
MAX_LINE_CHARS = 300
_OPEN_END = re.compile(r"\{(\d{1,3}),\}([?+]?)\Z")
# what may be missing, and then one character that must be there and is no letter
_NO_LETTER = r"(?:\\[^\w\s]|[-<>=,;:&%!\"'/@~#]|\[(?:[^\w\\^\]]|\\[^\w\s])(?:[^\w\\\]]|\\[^\w\s])*\])"
_AFTER_WORD = re.compile(
    rf"\)*+(?:\\s\*[?+]?|{_NO_LETTER}[?*]\+?|\(\?:(?:->\|\\\.|\\\.\|->)\)\?)*"
    rf"(?:{_NO_LETTER}|\\s(?!\*)|\(\?:(?:->\|\\\.|\\\.\|->)\))"
)
_WORD_ATOMS = frozenset({r"\w", r"\s", r"\d", r"\S", r"\W", r"\D"})


def bounded(pattern: str) -> str:
    """Return `pattern` with an upper bound on every repetition that has none."""
    out: list[str] = []
    position, atom = 0, ""
    while position < len(pattern):
        char = pattern[position]
        if char in "*+" and atom:
            limit = MAX_WORD_CHARS if atom in _WORD_ATOMS else MAX_REACH_CHARS
            limit = MAX_BLANK_CHARS if atom == r"\s" else limit
            limit = MAX_LINE_CHARS if atom.startswith("[^") and r"\n" in atom else limit
            out.append(f"{{{0 if char == '*' else 1},{limit}}}")
            position += 1  # a `?` or `+` after it says lazy or possessive, and stays
            if pattern[position : position + 1] in ("?", "+"):
                out.append(pattern[position])
                position += 1
            elif (atom == r"\s" and _is_mark(pattern, position)) or (atom == r"\w" and _ends_word(pattern, position)):
                out.append("+")
            atom = ""
            continue
        atom = _atom(pattern, position)
        open_end = _OPEN_END.match(atom)
        out.append(f"{{{open_end[1]},{MAX_REACH_CHARS + int(open_end[1])}}}{open_end[2]}" if open_end else atom)
        position += len(atom)
        if atom[0] in "(|^$?{":
            atom = "" if atom[0] != "{" else atom
    return "".join(out)


def _is_mark(pattern: str, position: int) -> bool:
    r"""Whether the piece at `position` is one character and no blank, so that blanks before it need not be given back.

    `\s*\(?\s*\)` would else be tried with every way of cutting a row of blanks in two.
    """
    while position < len(pattern):
        atom = _atom(pattern, position)
        single = (len(atom) == 2 and atom[0] == "\\" and not atom[1].isalnum()) or (
            len(atom) == 1 and atom not in "()[]{}.^$|?*+\\" and not atom.isspace()
        )
        if not single and atom not in (r"\w", r"\d"):
            return False
        position += len(atom)
        if pattern[position : position + 1] in ("*", "{"):
            return False
        if pattern[position : position + 1] != "?":
            return True
        position += 1
        if pattern[position : position + 1] == "?":
            return False
        if pattern[position : position + 3] in (r"\s*", r"\s+"):
            return _is_mark(pattern, position + 3 + (pattern[position + 3 : position + 4] in ("?", "+")))
    return False


def _ends_word(pattern: str, position: int) -> bool:
    r"""Whether what follows `\w+` at `position` begins with no letter, so that none before it is given back.

    `(\w+)\s*=` would else be tried with every beginning of every word that no `=` follows.
    """
    found = _AFTER_WORD.match(pattern, position)
    return found is not None and pattern[found.end() : found.end() + 1] not in ("?", "*", "{")


def _atom(pattern: str, position: int) -> str:
    """Return the next piece that a repetition may follow: an escape, a class, a counted repetition or one character."""
    char = pattern[position]
    if char == "\\":
        return pattern[position : position + 2]
    if char == "[":
        end = position + 1
        if pattern[end : end + 1] == "^":
            end += 1
        if pattern[end : end + 1] == "]":
            end += 1
        while pattern[end : end + 1] not in ("]", ""):
            end += 2 if pattern[end] == "\\" else 1
        return pattern[position : end + 1]
    if char == "{":
        end = pattern.find("}", position)
        body = pattern[position + 1 : end]
        if end > 0 and body and not body.strip("0123456789,"):
            rest = pattern[end + 1 : end + 2]
            return pattern[position : end + 1] + (rest if rest in ("?", "+") else "")
    return char
