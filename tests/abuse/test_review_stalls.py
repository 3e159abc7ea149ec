"""One request must not hold the event loop: what the guard looks at, it looks at in time proportional to its length."""

from __future__ import annotations

import time

import pytest

from server.guard import fences, languages, secrets

# Linear work on so much text takes milliseconds; the square of it took a minute. The limit lies far from both.
NUM_CHARS = 64_000
LIMIT_S = 10
LINES = {
    "spaces": " " * NUM_CHARS,
    "list marks and spaces": "-    " * (NUM_CHARS // 5),
    "backticks": "x" + "`" * NUM_CHARS + "!",
    "tildes": "~" * NUM_CHARS + "`!",
    "a decorator": "@" + "a" * NUM_CHARS + "!",
    "modifiers": "public " + "static " * (NUM_CHARS // 7) + "!",
}
CODE = {
    "line breaks": "\n" * NUM_CHARS,
    "conditions": "if \n" * (NUM_CHARS // 4),
    "a signature": "def a(" + ")" * NUM_CHARS,
    "a decorator": "@" + "a" * NUM_CHARS + "!",
    "an import": "import" + " " * NUM_CHARS + "!",
    "tags": "tags" + " " * NUM_CHARS + "!",
    "generics": "new a<> " * (NUM_CHARS // 8),
    "classes": "class a " * (NUM_CHARS // 8),
}


def took_s(look, text):
    start_s = time.process_time()
    look(text)
    return time.process_time() - start_s


@pytest.mark.parametrize("name", LINES)
def test_a_long_line_is_looked_at_in_linear_time(name: str):
    assert took_s(fences.segments_of, LINES[name]) < LIMIT_S
    assert took_s(fences.may_become_code, LINES[name]) < LIMIT_S


@pytest.mark.parametrize("name", CODE)
def test_a_language_is_guessed_in_linear_time(name: str):
    assert took_s(languages.guess, CODE[name]) < LIMIT_S


@pytest.mark.parametrize("letter", ["a", "-", "~", "\N{ZERO WIDTH SPACE}"])
def test_the_end_of_a_line_is_looked_at_in_linear_time(letter: str):
    assert took_s(secrets.live_from, letter * NUM_CHARS + "`!") < LIMIT_S
