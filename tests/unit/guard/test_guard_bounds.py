"""No rule's pattern reaches without end: a search through hostile text stays linear in its length."""

from __future__ import annotations

import importlib
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.guard import languages
from server.guard.bounds import MAX_REACH_CHARS, bounded
from server.guard.code import find_insecure
from server.guard.rules import load_language

constants: Any = importlib.import_module("re._constants")
parser: Any = importlib.import_module("re._parser")


def unbounded(pattern: re.Pattern[str]) -> bool:
    stack: list[Any] = list(parser.parse(pattern.pattern, pattern.flags))
    while stack:
        item = stack.pop()
        if isinstance(item, (tuple, list, parser.SubPattern)):
            parts = list(item)
            if parts and parts[0] in (constants.MAX_REPEAT, constants.MIN_REPEAT) and constants.MAXREPEAT in parts[1]:
                return True
            stack += parts
    return False


@pytest.mark.parametrize("name", languages.LANGUAGES)
def test_every_rule_is_bounded(name: str) -> None:
    rules = load_language(name)
    assert rules is not None
    for pattern in rules.patterns:
        for one in (pattern.match, pattern.call, pattern.args, *pattern.has, *pattern.lacks):
            assert one is None or not unbounded(one), pattern.rule.id


def test_what_is_bounded_still_matches_within_its_reach() -> None:
    assert unbounded(re.compile("a.*b"))
    pattern = re.compile(bounded(r"\bfoo\s*\([^;*+]*?(?:a|b)+\*\)"))
    assert not unbounded(pattern)
    assert pattern.search("foo (" + " " * (MAX_REACH_CHARS - 10) + "ab*)")
    assert not pattern.search("foo (" + " " * (MAX_REACH_CHARS + 10) + "ab*)")


def test_blanks_before_a_mark_are_not_given_back() -> None:
    possessive = re.compile(bounded(r"x\s*\(?\s*\*?\s*=?\s*\w+\s*;"))
    assert possessive.search("x ( * = y ;")
    assert possessive.search("x y;")
    assert bounded(r"\s*,").endswith("+,")
    for kept in (r"\s*\n", r"\s*[^;]", r"\s*x*", r"\s*.", r"\s*$", r"\s*x{0,2}", r"\s*?x", r"\s*(?:\s|a)"):
        assert "+" not in bounded(kept)[4:], kept


HOSTILE = [  # each took seconds to hours a few kilobytes once
    ("javascript", "import a" + " " * 20_000),
    ("javascript", "console.a(${ " * 700),
    ("java", "catch(" + " " * 20_000),
    ("c", "while(*a" + " " * 20_000),
    ("c", "char *p = malloc(a,\n" + "    b,\n" * 4_000),
    ("c", "a->b;\n" + "    c\n" * 4_000),
    ("dockerfile", "RUN apt-get install a" + " apt-get install a" * 1_000),
    ("shell", "curl>" * 1_500),
    ("sql", "UPDATE a SET" + " " * 20_000),
]


@pytest.mark.parametrize(("language", "text"), HOSTILE, ids=[f"{a}-{b[:8].strip()}" for a, b in HOSTILE])
def test_hostile_text_is_read_in_bounded_time(language: str, text: str) -> None:
    begin = time.process_time()
    find_insecure(text, language)
    assert time.process_time() - begin < 30  # a second or less; what is not bounded takes minutes


@given(st.text(alphabet="ab*+?{},123[]^\\().|", max_size=24))
def test_what_compiles_compiles_bounded(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, FutureWarning):  # not a pattern, or one that reads in two ways
        return
    assert not unbounded(re.compile(bounded(pattern))) or re.search(r"\{\d{4,},\}|\{,\}", pattern)
