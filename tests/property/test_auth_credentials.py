"""Whatever is offered as a credential: a principal for the one right text, and AuthenticationError for all others."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.auth.api_key import KeyRing, new_key
from server.auth.authenticator import Authenticator
from server.auth.pepper import Pepper
from server.auth.throttle import FailureThrottle
from server.errors import AuthenticationError
from server.store.incidents import Quarantine
from server.store.keys import KeyRow
from server.types import Client, Credentials, Secret

PEPPER = Pepper({1: bytes(range(32)), 2: bytes(range(50, 82))})
KEY = new_key(PEPPER)
TEXT = KEY.text.reveal()


def new_authenticator():
    ring = KeyRing(PEPPER)
    ring.load([
        KeyRow(KEY.id, KEY.digest, KEY.pepper, "ana", "acme", frozenset(), frozenset({"*"}), "", 1.0, "test")
    ])  # fmt: skip
    return Authenticator(
        ring, throttle=FailureThrottle(burst=10**9), keyless=FailureThrottle(burst=10**9), quarantine=Quarantine()
    )


AUTH = new_authenticator()
HERE = Client("127.0.0.1", "")


def ask(*texts, malformed=None, certificate=None):
    credentials = Credentials(tuple(Secret(text) for text in texts), malformed, certificate)
    return asyncio.run(AUTH.authenticate(credentials, HERE))


@given(
    st.lists(st.text(max_size=80) | st.from_regex(r"sr_[a-z0-9]{12}_[A-Za-z0-9]{43}", fullmatch=True), max_size=3),
    st.none() | st.text(max_size=10),
    st.none() | st.binary(max_size=50),
)
@settings(max_examples=300, deadline=None)
def test_no_other_text_gets_in(texts, malformed, certificate):
    with pytest.raises(AuthenticationError) as caught:
        ask(*texts, malformed=malformed, certificate=certificate)
    assert not any(text and len(text) > 20 and text in str(caught.value) + repr(caught.value) for text in texts)


@given(st.integers(0, len(TEXT) - 1), st.characters(max_codepoint=0x2FF))
@settings(max_examples=200, deadline=None)
def test_no_changed_letter_gets_in(position, letter):
    changed = TEXT[:position] + letter + TEXT[position + 1 :]
    if changed == TEXT:
        assert ask(changed).subject == "ana"
        return
    with pytest.raises(AuthenticationError):
        ask(changed)
