"""Tokens whose key is not known yet: one look at the provider serves all who wait for it."""

import asyncio
import json
import threading
from typing import Any, cast

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from server.auth.oidc import ClaimRules, OIDCVerifier
from server.errors import AuthenticationError

ISSUER = "https://id.example.com"
NOW_S = 1_000.0
PRIVATE = ec.generate_private_key(ec.SECP256R1())


class SlowKeys:
    """A provider that answers when it is let, with one key."""

    issuer = ISSUER
    has_keys = True

    def __init__(self) -> None:
        self.num_fetches = 0
        self.is_asked = asyncio.Event()
        self.may_answer = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.known: dict[str, jwt.PyJWK] = {}

    def find(self, key_id: str) -> jwt.PyJWK | None:
        return self.known.get(key_id)

    def is_stale(self) -> bool:
        return False

    def may_look(self) -> bool:
        return self.num_fetches == 0

    def fetch(self) -> None:
        self.num_fetches += 1
        self.loop.call_soon_threadsafe(self.is_asked.set)
        self.may_answer.wait(30)
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(PRIVATE.public_key()))
        self.known["new"] = jwt.PyJWK.from_dict(public | {"kid": "new", "alg": "ES256"})


def token(number: int, key_id: str) -> str:
    claims = {"iss": ISSUER, "aud": "us", "sub": f"ana{number}", "tenant": "acme", "iat": NOW_S, "exp": NOW_S + 60}
    return jwt.encode(claims, PRIVATE, algorithm="ES256", headers={"kid": key_id, "typ": "at+jwt"})


async def test_a_crowd_with_unknown_keys_takes_one_thread_and_looks_once():
    keys = SlowKeys()
    verifier = OIDCVerifier(cast("Any", keys), ClaimRules(audience="us"), clock=lambda: NOW_S)
    crowd = [
        asyncio.create_task(verifier.authenticate(token(number, "new" if number % 2 else "invented")))
        for number in range(200)
    ]
    await asyncio.wait_for(keys.is_asked.wait(), 20)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 20) == "free"  # while all of them wait
    keys.may_answer.set()
    outcomes = await asyncio.gather(*crowd, return_exceptions=True)
    assert [type(one) for one in outcomes[::2]] == [AuthenticationError] * 100
    assert {cast("Any", one).tenant for one in outcomes[1::2]} == {"acme"}
    assert keys.num_fetches == 1
