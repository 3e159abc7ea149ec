"""The one place that decides who a caller is."""

import asyncio

import pytest

from server.auth.api_key import KeyRing, new_key
from server.auth.authenticator import Authenticator
from server.auth.pepper import Pepper
from server.auth.throttle import (
    MAX_ADDRESSES,
    MAX_REPORTED,
    OTHERS,
    FailureThrottle,
    keyless_throttle,
    report_suppressed,
)
from server.errors import AuditUnavailableError, AuthenticationError, ThrottledError, UnavailableError
from server.store.incidents import Incident, Quarantine, Quarantined
from server.store.keys import KeyRow
from server.types import Client, Credentials, Principal, Secret, SubjectId, TenantId

PEPPER = Pepper({1: bytes(range(32))})
HERE = Client("10.0.0.1", "curl/8")
THERE = Client("10.0.0.2", "curl/8")


class World:
    """An authenticator with one key of acme's and one of zeta's, and a clock that is moved by hand."""

    def __init__(self, **changes):
        self.now_s = 1000.0
        self.age_s = 0.0
        self.key, self.other = new_key(PEPPER), new_key(PEPPER)
        self.ring = KeyRing(PEPPER, clock=lambda: self.now_s)
        self.ring.load([self.row(self.key, "acme"), self.row(self.other, "zeta")])
        self.quarantine = Quarantine()
        self.throttle = FailureThrottle(burst=3, refill_s=10.0, clock=lambda: self.now_s)
        self.auth = Authenticator(
            self.ring,
            throttle=self.throttle,
            keyless=keyless_throttle(),
            quarantine=self.quarantine,
            store_age_s=lambda: self.age_s,
            **changes,
        )

    @staticmethod
    def row(key, tenant, **changes):
        values = {
            "id": key.id, "digest": key.digest, "pepper": 1, "subject": "ana", "tenant": tenant,
            "groups": frozenset(), "scopes": frozenset({"model:*"}), "note": "", "created_at_s": 1.0, "created_by": "t",
        }  # fmt: skip
        return KeyRow(**(values | changes))

    async def ask(self, *texts, client=HERE, **changes):
        return await self.auth.authenticate(Credentials(tuple(Secret(text) for text in texts), **changes), client)


async def test_a_valid_key_is_let_in():
    world = World()
    assert (await world.ask(world.key.text.reveal())).tenant == "acme"


@pytest.mark.parametrize("texts", [(), ("",), ("x",), ("sr_",), ("sr_abc_def",), ("a.b.c",), ("é" * 40,), ("\0" * 60,)])
async def test_what_is_no_key_is_refused(texts):
    with pytest.raises(AuthenticationError):
        await World().ask(*texts)


async def test_two_credentials_are_refused_though_both_are_valid():
    world = World()
    with pytest.raises(AuthenticationError) as caught:
        await world.ask(world.key.text.reveal(), world.other.text.reveal())
    assert caught.value.reason == "more than one credential"


async def test_a_malformed_header_is_refused_though_another_is_valid():
    world = World()
    with pytest.raises(AuthenticationError):
        await world.ask(world.key.text.reveal(), malformed="authorization is not Bearer")


async def test_failures_are_throttled_by_address_and_a_valid_key_still_works():
    world = World()
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            await world.ask("wrong")
    with pytest.raises(ThrottledError) as caught:
        await world.ask("wrong")
    assert caught.value.retry_after_s == 10
    assert caught.value.code == "authentication_throttled"
    assert (await world.ask(world.key.text.reveal())).tenant == "acme"
    with pytest.raises(AuthenticationError):
        await world.ask("wrong", client=THERE)
    world.now_s += 10.0
    with pytest.raises(AuthenticationError):
        await world.ask("wrong")


async def test_wrong_keys_of_our_form_are_throttled_too():
    world = World()
    kinds = []
    for _ in range(100):
        with pytest.raises((AuthenticationError, ThrottledError)) as caught:
            await world.ask(new_key(PEPPER).text.reveal())
        kinds.append(caught.type)
    assert kinds == [AuthenticationError] * 3 + [ThrottledError] * 97


async def test_tokens_are_not_verified_while_throttled_unless_known():
    seen = []
    known = Principal(SubjectId("t"), TenantId("acme"), frozenset(), frozenset(), "oidc", "j", None)

    class Tokens:
        def remembered(self, token):
            return known if token == "known.to.us" else None

        async def authenticate(self, token):
            seen.append(token)
            raise AuthenticationError("bad signature")

    world = World(tokens=Tokens())
    for _ in range(10):
        with pytest.raises((AuthenticationError, ThrottledError)):
            await world.ask("a.b.c")
    assert len(seen) == 3
    assert await world.ask("known.to.us") is known


async def test_nobody_is_let_in_when_revocations_cannot_be_read():
    world = World()
    world.age_s = 6.0
    with pytest.raises(UnavailableError):
        await world.ask(world.key.text.reveal())


@pytest.mark.parametrize(("kind", "target"), [("subject", "acme/ana"), ("tenant", "acme"), ("key", None)])
async def test_quarantine_ends_requests_and_streams(kind, target):
    world = World()
    principal = await world.ask(world.key.text.reveal())
    assert not world.auth.is_revoked(principal)
    incident = Incident(1, Quarantined(kind), target or world.key.id, "leak", 1.0, "sam")
    world.quarantine.load([incident])
    assert world.auth.is_revoked(principal)
    with pytest.raises(AuthenticationError):
        await world.ask(world.key.text.reveal())
    assert (await world.ask(world.other.text.reveal())).tenant == "zeta"


async def test_revocation_and_expiry_are_seen_by_a_running_stream():
    world = World()
    principal = await world.ask(world.key.text.reveal())
    world.ring.load([world.row(world.key, "acme", expires_at_s=2000.0)])
    assert not world.auth.is_revoked(principal)
    world.now_s = 2000.0
    assert world.auth.is_revoked(principal)
    other = await world.ask(world.other.text.reveal())
    world.ring.load([world.row(world.other, "zeta", revoked_at_s=1.0)])
    assert world.auth.is_revoked(other)


def test_throttle_memory_is_bounded_and_ipv6_is_counted_by_network():
    throttle = FailureThrottle(burst=1, refill_s=100.0, clock=lambda: 0.0)
    throttle.fail("2001:db8::1")
    assert throttle.wait_s("2001:db8::2") == 100.0
    assert throttle.wait_s("2001:db8:0:1::2") == 0.0
    assert throttle.wait_s("::ffff:10.0.0.1") == 0.0
    for number in range(MAX_ADDRESSES + 10):
        throttle.fail(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(throttle) == MAX_ADDRESSES


async def test_callers_without_a_credential_are_throttled_apart():
    world = World()
    for malformed in (None, "authorization is not Bearer") * 300:
        with pytest.raises(AuthenticationError):
            await world.ask(malformed=malformed)
    with pytest.raises(ThrottledError):
        await world.ask()
    with pytest.raises(AuthenticationError):  # and not told to wait
        await world.ask("wrong")
    with pytest.raises(AuthenticationError):
        await world.ask(client=THERE)
    assert (await world.ask(world.key.text.reveal())).tenant == "acme"


def test_addresses_beyond_the_bound_are_summed_together():
    throttle = FailureThrottle(burst=1, refill_s=1e9, clock=lambda: 0.0)
    for number in range(MAX_REPORTED + 7):
        for _ in range(2):
            throttle.fail(f"10.0.{number >> 8}.{number & 255}")
    taken = throttle.suppressed()
    assert taken[OTHERS] == 7
    assert sum(taken.values()) == MAX_REPORTED + 7


async def test_failures_turned_away_unseen_are_put_on_record_in_sums():
    world = World()
    for _ in range(10):
        with pytest.raises((AuthenticationError, ThrottledError)):
            await world.ask("wrong")
    log = []
    reported = asyncio.Event()

    is_down = 3

    async def record(event, **fields):
        nonlocal is_down
        if is_down:
            is_down -= 1
            world.throttle.fail("10.0.0.1")  # more come while the log is down
            raise AuditUnavailableError("the disk is full")
        log.append((event, fields))
        reported.set()

    task = asyncio.create_task(report_suppressed({"throttled": world.throttle}, record, interval_s=0.001))
    await asyncio.wait_for(reported.wait(), 5)
    await asyncio.sleep(0.01)
    task.cancel()
    assert log == [("gateway:credential:refused", {"reason": "throttled", "address": "10.0.0.1", "num_failures": 10})]
    assert world.throttle.suppressed() == {}


def test_failures_that_come_while_a_sum_is_put_on_record_stay_for_the_next():
    throttle = FailureThrottle(burst=1, refill_s=1e9, clock=lambda: 0.0)
    for _ in range(4):
        throttle.fail("10.0.0.1")
    (taken,) = throttle.suppressed().values()
    throttle.fail("10.0.0.1")
    throttle.reported("10.0.0.1", taken)
    assert throttle.suppressed() == {"10.0.0.1": 1}


async def test_whoever_is_served_is_served_no_more_once_revocations_may_have_been_missed():
    world = World()
    principal = await world.ask(world.key.text.reveal())
    world.age_s = 5.0
    assert not world.auth.is_revoked(principal)
    world.age_s = 5.1
    with pytest.raises(UnavailableError):
        world.auth.is_revoked(principal)
    with pytest.raises(UnavailableError):
        await world.ask(world.key.text.reveal())
    world.age_s = 0.0
    assert not world.auth.is_revoked(principal)
