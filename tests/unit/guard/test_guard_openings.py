"""A pattern that begins with what can be looked for finds what it found; the words that it asks for stand in it."""

import re

import pytest

from server.guard.bounds import bounded
from server.guard.literals import Text, required_words
from server.guard.openings import opened

TEXT = """unsigned int a; int b ; u_int c; freed(x); free (y); xfree(z); new int[3]; std::size_t n; size_t m;
long_name->x = 1; name.y = 2; u8 = uint16_t(4); call( a ) ; table[ index ] = strrchr(p, '/');"""


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bfree\s*\(",
        r"\bfree?\b",
        r"(?<!unsigned )\b(?:int|u?int16_t|long)\b",
        r"\b(?<!new )(?:int|size_t)\s+(\w+)\s*;",
        r"\b(?:std::)?size_t\s+(\w+)",
        r"\b(?:(?:std::)?size_t|int)\s+(\w+)",
        r"\bint\b|\b(free|call)\s*\(|=\s*\d",
        r"(?:\bchar|\bint)\s+\w",
        r"\b(\w+)\s*[;(]",
        r"(\w+)(?:->|\.)?\w*\s*=",
        r"\w+\s*\[\s*\w+\s*\]",
        r"\bu?int",
        r"x|\b(?:a|b)(?=;)",
    ],
)
def test_the_same_is_found(pattern: str) -> None:
    """Moving a boundary behind its word, and keeping a word whole, change no match."""
    made = opened(bounded(pattern))
    assert [m.span() for m in re.finditer(made, TEXT)] == [m.span() for m in re.finditer(pattern, TEXT)]


def test_a_boundary_stands_behind_its_word() -> None:
    """So that the engine can skip to the word."""
    assert opened(r"\b(?:int|(?:std::)?size_t) x") == (r"(?:int(?<=\bint)|std(?<=\bstd)::size_t|size_t(?<=\bsize_t)) x")
    assert opened(r"(?<!new )\bint x") == r"int(?<=\bint)(?<!new int) x"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"strr?chr|strstr", {"strchr", "strrchr", "strstr"}),
        (r"\b[fs]?printf\(", {"printf("}),
        (r"u?int(?:16|32)_t", {"int16_t", "int32_t"}),
        (r"(?i)PassWord", {"password"}),
        (r"a\w+(?:one|two)", {"one", "two"}),
    ],
)
def test_the_words_are_whole(pattern: str, words: set[str]) -> None:
    """What is spelt in a few ways is asked for in all of them, without those that hold another."""
    (need,) = required_words([re.compile(pattern)])
    assert set(need.words) == words


@pytest.mark.parametrize(
    "text", ["", "a", "abc", "int x = 1", "the PRINTF(x)", "x\u20acpassword\U0001f600", "pass word"]
)
@pytest.mark.parametrize("pattern", ["int", "(?i)printf", "password", "ab|password", "(?i)x\u20acpass"])
def test_a_text_holds_what_stands_in_it(text: str, pattern: str) -> None:
    """Words of any length and any letter; a pattern that matches is never left out."""
    needs = required_words([re.compile(pattern)])
    held = Text(text.lower()).holds(needs)
    assert held == any(word in text.lower() for need in needs for word in need.words)
    assert held or not re.search(pattern, text)
