"""What only looks like a nested repetition is told from one that takes exponential time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.guard.repeats import is_ambiguous, literal_in


@pytest.mark.parametrize(
    "expression",
    [
        r"(a+)+", r"(a*)*", r"(a|a)*", r"(\w|\d)+$", r"^(\w+\s?)*$", r"(?:[a-z0-9]+[._-]?)+", r"(x+x+)+y", r"(.*,)*",
        r"(a|ab|b)*c", r"(?:\s*\w+\s*)*", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(?:a{2,}b?)+",
    ],
)  # fmt: skip
def test_two_ways_round_are_found(expression: str) -> None:
    assert is_ambiguous(expression)


@pytest.mark.parametrize(
    "expression",
    [
        r"[a-z0-9]+(?:[._-][a-z0-9]+)*", r"(?:[^\"\\]|\\.)*", r"(/[^/]+)+/?", r"(\.\d+)*", r"(\w+\s+)*x", r"([^,]*,)*",
        r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,}", r"(?:\d+\s*,\s*)*\d+", r"(?P<word>\w+:)*",
        r"(?=a+)(?:b)+", r"(\d+;){1,3}", r"[]a-]+(b[]]+)*", r"v?\d+(?:\.\d+){0,3}(?:-[a-z]+(?:\.[a-z]+)*)?",
    ],
)  # fmt: skip
def test_what_only_looks_nested_is_not(expression: str) -> None:
    assert not is_ambiguous(expression)


@given(st.text(alphabet="ab()[]{}|*+?\\^$.,:<>=!-0123dw", max_size=60))
def test_any_text_is_read_to_its_end(expression: str) -> None:
    started = time.process_time()
    is_ambiguous(expression)
    assert time.process_time() - started < 1


def test_a_deep_or_long_expression_counts_as_slow() -> None:
    assert is_ambiguous("(" * 5000)
    assert is_ambiguous("(?:" + r"\w?" * 39 + "a)*")


def test_the_literal_is_what_the_engine_gets() -> None:
    assert literal_in(r'Pattern.compile("\\d+(\\.\\d+)*")', 0) == r"\d+(\.\d+)*"
    assert literal_in(r're.compile(r"\d+\"x")', 0) == r"\d+\"x"
    assert literal_in(r"if (/a\/b/.test(x))", 3) == r"a\/b"
