"""The strings that stand beside a sign of a language: no text that has the sign goes without one of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.guard import languages
from server.guard.languages import SIGNS, Sign
from tests.property.test_guard_release import TEXTS
from tests.unit.guard.test_guard_cases import PAIRS

ALL = [sign for signs in SIGNS.values() for sign in signs]
# How a letter beyond ASCII stands for one within it, where case does not count.
OTHER_CASES = str.maketrans({"s": "\u017f", "i": "\u0131", "k": "\u212a"})


@pytest.mark.parametrize("sign", ALL, ids=lambda sign: sign.pattern.pattern[:40])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_a_sign_matches_is_looked_at(data: st.DataObject, sign: Sign) -> None:
    text = data.draw(st.from_regex(sign.pattern))
    assert sign.stands_in(text, text.lower())


def test_every_sign_is_found_where_a_search_finds_it() -> None:
    texts = [*TEXTS, *(code for pair in PAIRS for code in (pair.insecure, pair.safe))]
    forms = [form for text in texts for form in (text, text.upper(), text.lower().translate(OTHER_CASES))]
    for text in forms:
        lowered = text.lower()
        for sign in ALL:
            assert sign.stands_in(text, lowered) == (sign.pattern.search(text) is not None), sign.pattern.pattern


def test_letters_beyond_ascii_do_not_hide_a_sign() -> None:
    assert languages.guess("\u017felect a from b") == "sql"
