"""Which completion makes which one stale: the same place after some key strokes, nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.supersede import Place
from server.types import Completion

CODE = "".join(f"def function_{n}(argument):\n    return argument * {n}\n\n" for n in range(40))


def place(before, after):
    return Place.of(Completion(before, after))


AT = 900
OLD = place(CODE[:AT], CODE[AT:])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CODE[:AT] + "x", CODE[AT:]),
        (CODE[:AT] + "print(", ")" + CODE[AT:]),  # the editor closed the bracket
        (CODE[: AT - 5], CODE[AT:]),
        (CODE[: AT - 5] + "other", CODE[AT:]),
        (CODE[:AT] + "    a whole line was accepted\n" * 4, CODE[AT:]),
        (CODE[1:AT] + "x", CODE[AT:]),  # the editor sends a window that moves
        (CODE[:AT], "\n" + CODE[AT:]),
    ],
)
def test_typing_makes_it_stale(before, after):
    assert place(before, after).makes_stale(OLD)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CODE[:AT], CODE[AT:]),  # an alternative
        (CODE[:300], CODE[300:]),  # elsewhere in the file
        (CODE[:1700], CODE[1700:]),
        ("import os\n" * 100, "print(os)\n" * 100),
        ("", ""),
        (CODE[:AT], ""),
        ("", CODE[AT:]),
    ],
)
def test_other_places_and_alternatives_do_not(before, after):
    assert not place(before, after).makes_stale(OLD)


def test_an_almost_empty_file_is_one_place():
    assert place("def f", "").makes_stale(place("def ", ""))
    assert place("d", "").makes_stale(place("", ""))


@given(st.text(max_size=600), st.text(max_size=600), st.text(min_size=1, max_size=24))
def test_a_few_typed_characters_are_always_the_same_place(before, after, typed):
    assert place(before + typed, after).makes_stale(place(before, after))
    assert place(before, after).makes_stale(place(before + typed, after))


@given(st.text(max_size=600), st.text(max_size=600))
def test_nothing_makes_its_own_alternative_stale(before, after):
    assert not place(before, after).makes_stale(place(before, after))
