"""Limits, the same suite over counts in memory and in a real Redis; then two replicas on one Redis."""

import asyncio
import subprocess
import sys
import time

import pytest
from redis.asyncio import Redis

from server.errors import ConfigError, RateLimitedError, UnavailableError
from server.policy.budget import LimitedUse, UsageBook
from server.policy.limit_file import parse_limits
from server.policy.rate import MemoryLedger
from server.policy.shared_ledger import SharedLedger
from server.types import Chat, ModelRequest, Outcome, Principal, SubjectId, TenantId, Usage, WireFormat
from tests.integration.redis_server import flush

NOON_S = 1_800_000_000.0 // 86400 * 86400 + 43200
REQUEST = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "x"},)), {})


def new_principal(key="k1", subject="ana", tenant="acme", groups=("developers",)):
    return Principal(SubjectId(subject), TenantId(tenant), frozenset(groups), frozenset({"*"}), "api_key", key)


class World:
    """Limits with a clock that is moved by hand."""

    def __init__(self, new_ledger, *limits, prices=None, max_wait_s=0):
        self.now_s = NOON_S
        book = parse_limits({"limits": list(limits), "prices": prices or {}, "max_wait_s": max_wait_s})
        self.ledger = new_ledger(book, lambda: self.now_s)
        self.limits = LimitedUse(book, ledger=self.ledger, usage=UsageBook(clock=lambda: self.now_s))

    def reserve(self, principal=None, prompt=10, most=10):
        return self.limits.reserve(principal or new_principal(), REQUEST, prompt_tokens=prompt, max_tokens=most)

    async def spend(self, principal=None, prompt=10, most=10, used=None):
        try:
            async with self.reserve(principal, prompt, most) as held:
                if used is not None:
                    held.settle(Outcome("completed", usage=Usage(prompt, used)))
        finally:
            await self.settled()
        return held

    async def settled(self):
        if isinstance(self.ledger, SharedLedger):
            await self.ledger.wait_settled()


@pytest.fixture(params=["memory", "redis"])
async def new_world(request):
    opened = []

    def new_ledger(book, clock):
        if request.param == "memory":
            return MemoryLedger(book, clock=clock)
        opened.append(SharedLedger(request.getfixturevalue("redis_server").url, book, clock=clock))
        return opened[-1]

    if request.param == "redis":
        await flush(request.getfixturevalue("redis_server"))
    yield lambda *limits, **changes: World(new_ledger, *limits, **changes)
    for ledger in opened:
        await ledger.close()


async def test_requests_a_minute(new_world):
    world = new_world({"per": "key", "requests_per_minute": 2})
    first = await world.spend()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    await world.spend()
    with pytest.raises(RateLimitedError) as caught:
        await world.spend()
    assert caught.value.retry_after_s > 60
    await world.spend(new_principal("k2"))
    world.now_s += 60
    with pytest.raises(RateLimitedError):
        await world.spend()
    world.now_s += 30
    await world.spend()


async def test_a_batch_counts_as_so_many_requests_and_one_that_runs(new_world):
    world = new_world({"per": "key", "requests_per_minute": 5, "concurrent": 1})
    async with world.limits.visit(new_principal(), num_requests=3) as headers:
        assert headers["x-ratelimit-remaining-requests"] == "2"
    await world.settled()
    with pytest.raises(RateLimitedError) as caught:
        async with world.limits.visit(new_principal(), num_requests=3):
            raise AssertionError("it was let in")
    assert caught.value.code == "rate_limit_exceeded"
    async with world.limits.visit(new_principal(), num_requests=2) as headers:  # a refused batch took nothing
        assert headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimitedError) as caught:
        async with world.limits.visit(new_principal("k2"), num_requests=6):
            raise AssertionError("it was let in")
    assert caught.value.code == "request_over_limit"


async def test_tokens_are_held_in_full_and_settled_by_use(new_world):
    world = new_world({"per": "key", "tokens_per_minute": 100})
    async with world.reserve(prompt=20, most=60) as held:
        assert held.headers["x-ratelimit-remaining-tokens"] == "20"
        with pytest.raises(RateLimitedError):
            await world.spend(prompt=20, most=1)
        held.settle(Outcome("completed", usage=Usage(20, 5)))
        held.settle(Outcome("completed", usage=Usage(20, 50)))
    await world.settled()
    assert (await world.spend(prompt=5, most=70)).headers["x-ratelimit-remaining-tokens"] == "0"


async def test_what_was_not_settled_is_given_back(new_world):
    world = new_world({"per": "key", "tokens_per_minute": 100, "concurrent": 1})
    for _ in range(5):
        with pytest.raises(ValueError, match="engine"):
            async with world.reserve(prompt=50, most=50):
                raise ValueError("the engine failed")
        await world.settled()
    await world.spend(prompt=50, most=50)


@pytest.mark.parametrize(
    ("limit", "fits"),
    [
        ({"tokens_per_day": 99}, False),
        ({"tokens_per_day": 100}, True),
        ({"tokens_per_minute": 99}, False),
        ({"tokens_per_minute": 100}, True),
        ({"cost_per_day": 99}, False),
        ({"cost_per_month": 100}, True),
        ({"requests_per_minute": 1, "concurrent": 1}, True),  # it is no other request
    ],
)
async def test_one_more_turn_of_a_request_is_held_too(new_world, limit, fits):
    world = new_world({"per": "key"} | limit, prices={"m": {"prompt": 1e6, "completion": 1e6}})
    async with world.reserve(prompt=20, most=30) as held:
        if fits:
            async with held.extend(prompt_tokens=40, max_tokens=10) as spent:
                spent.add(Usage(40, 1))
        else:
            with pytest.raises(RateLimitedError):
                async with held.extend(prompt_tokens=40, max_tokens=10):
                    pytest.fail("it ran beyond the limit")
        held.settle(Outcome("completed", usage=Usage(20 + 40 * fits, 2 + fits)))
    await world.settled()
    if "requests_per_minute" in limit:
        world.now_s += 120
        await world.spend(prompt=20, most=30)  # its places are free again
        return
    used = 22 + 41 * fits
    most = next(iter(limit.values())) - used
    with pytest.raises(RateLimitedError):
        await world.spend(prompt=most, most=1)
    await world.spend(prompt=most, most=0)


async def test_a_request_that_never_fits_is_told_not_to_come_back(new_world):
    world = new_world({"per": "key", "tokens_per_minute": 100}, max_wait_s=5)
    with pytest.raises(RateLimitedError) as caught:
        await world.spend(prompt=101, most=0)
    assert caught.value.code == "request_over_limit"
    assert caught.value.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("limit", [{"tokens_per_day": 100}, {"cost_per_day": 100}, {"cost_per_month": 100}])
async def test_what_no_whole_period_holds_never_fits_just_before_its_end_either(new_world, limit):
    world = new_world({"per": "key"} | limit, prices={"m": {"prompt": 1e6, "completion": 1e6}})
    world.now_s += 30 * 86400 + 43200 - 60  # a minute before a day ends
    with pytest.raises(RateLimitedError) as caught:
        await world.spend(prompt=101, most=0)
    assert caught.value.code == "request_over_limit"
    assert caught.value.headers["x-should-retry"] == "false"


async def test_streams_at_once_wait_for_a_place(new_world):
    world = new_world({"per": "key", "concurrent": 1}, max_wait_s=5)
    order = []

    async def one(name):
        async with world.reserve():
            order.append(name)
            await asyncio.sleep(0)

    async with world.reserve():
        tasks = [asyncio.create_task(one(name)) for name in "abc"]
        await asyncio.sleep(0.01)
        assert order == []
    await asyncio.gather(*tasks)
    assert sorted(order) == ["a", "b", "c"]
    assert world.limits.waiting == {}


async def test_the_wait_is_bounded_and_leaves_nothing_behind(new_world):
    world = new_world({"per": "key", "concurrent": 1}, max_wait_s=0.05)
    async with world.reserve():
        with pytest.raises(RateLimitedError):
            await world.spend()
    assert world.limits.waiting == {}
    await world.spend()


async def test_one_who_leaves_while_waiting_takes_no_place(new_world):
    world = new_world({"per": "key", "concurrent": 1}, max_wait_s=5)
    async with world.reserve():
        task = asyncio.create_task(world.spend())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert world.limits.waiting == {}
    await world.spend()


@pytest.mark.parametrize("per", ["key", "subject", "team", "tenant", "model"])
async def test_every_dimension_counts(new_world, per):
    world = new_world({"per": per, "tokens_per_day": 30})
    await world.spend(used=10)
    with pytest.raises(RateLimitedError) as caught:
        await world.spend()
    assert caught.value.code == "insufficient_quota"
    assert per in str(caught.value)
    other = new_principal("k9", "bob", "zeta", ("developers",))
    if per == "model":
        with pytest.raises(RateLimitedError):
            await world.spend(other)
    else:
        await world.spend(other)  # a group of the same name in another tenant is another team


async def test_a_named_rule_takes_the_place_of_the_general_one(new_world):
    world = new_world(
        {"per": "team", "requests_per_minute": 1},
        {"per": "team", "name": "leads", "requests_per_minute": 2},
        {"per": "team", "name": "zeta/leads", "requests_per_minute": 3},
    )
    for group, tenant, limit in (("developers", "acme", 1), ("leads", "acme", 2), ("leads", "zeta", 3)):
        principal = new_principal(tenant=tenant, groups=(group,))
        for _ in range(limit):
            await world.spend(principal)
        with pytest.raises(RateLimitedError):
            await world.spend(principal)


async def test_a_day_ends_at_midnight_and_a_month_on_its_last_day(new_world):
    world = new_world(
        {"per": "key", "tokens_per_day": 20, "cost_per_month": 40}, prices={"m": {"prompt": 1e6, "completion": 1e6}}
    )
    await world.spend(used=10)
    with pytest.raises(RateLimitedError) as caught:
        await world.spend()
    assert caught.value.retry_after_s == 43200
    world.now_s += 43200
    await world.spend(used=10)
    world.now_s += 86400
    with pytest.raises(RateLimitedError, match="spending a month"):
        await world.spend()
    world.now_s += 31 * 86400
    await world.spend(used=10)


async def test_money_is_held_and_settled(new_world):
    world = new_world({"per": "tenant", "cost_per_day": 1}, prices={"*": {"prompt": 10_000, "completion": 20_000}})
    await world.spend(prompt=10, most=20, used=1)  # holds 0.5, spends 0.12
    await world.spend(prompt=10, most=20, used=20)
    with pytest.raises(RateLimitedError, match="spending a day"):
        await world.spend(prompt=10, most=20)


async def test_both_count_alike_over_months(new_world):
    """The calendar in the script is the calendar of Python: at every end of a month the budget begins anew."""
    world = new_world({"per": "key", "cost_per_month": 20}, prices={"m": {"prompt": 1e6, "completion": 1e6}})
    starts_s = [1704067200 + 86400 * day for day in (31, 60, 91, 121, 152, 182, 213, 244, 274, 305, 335, 366, 397, 425)]
    for start_s in starts_s:  # the first seconds of February 2024 to March 2025
        world.now_s = start_s - 1.0
        await world.spend(used=10)
        with pytest.raises(RateLimitedError) as caught:
            await world.spend()
        assert caught.value.retry_after_s == 1
        world.now_s = start_s
        await world.spend()


async def test_redis_that_does_not_answer_refuses(tmp_path):
    book = parse_limits({"limits": [{"per": "key", "concurrent": 1}]})
    ledger = SharedLedger(f"unix://{tmp_path / 'none.sock'}", book)
    limits = LimitedUse(book, ledger=ledger, usage=UsageBook())
    with pytest.raises(UnavailableError):
        async with limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=1):
            pytest.fail("it ran uncounted")
    await ledger.close()
    with pytest.raises(ConfigError):
        SharedLedger("http://redis", book)


async def test_a_replica_that_starts_on_an_empty_redis_is_seeded_once(redis_server):
    await flush(redis_server)
    book = parse_limits({"limits": [{"per": "tenant", "tokens_per_day": 100}], "max_wait_s": 0})
    ledger = SharedLedger(redis_server.url, book)
    limits = LimitedUse(book, ledger=ledger, usage=UsageBook())
    for _ in range(2):
        await ledger.adopt(book, [("tenant", "acme", 90, 0, 0), ("key", "nobody", 5, 0, 0)])
    async with limits.reserve(new_principal(), REQUEST, prompt_tokens=5, max_tokens=5) as held:
        held.settle(Outcome("completed", usage=Usage(5, 5)))
    with pytest.raises(RateLimitedError):
        async with limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=0):
            pytest.fail("more than the budget")
    await ledger.close()


async def test_places_of_a_replica_that_died_come_free(redis_server):
    await flush(redis_server)
    now = [NOON_S]
    book = parse_limits({"limits": [{"per": "key", "concurrent": 1}], "max_wait_s": 0})
    dead = SharedLedger(redis_server.url, book, clock=lambda: now[0])
    alive = SharedLedger(redis_server.url, book, clock=lambda: now[0])
    held = LimitedUse(book, ledger=dead, usage=UsageBook()).reserve(
        new_principal(), REQUEST, prompt_tokens=1, max_tokens=1
    )
    await held.__aenter__()
    limits = LimitedUse(book, ledger=alive, usage=UsageBook())
    with pytest.raises(RateLimitedError):
        async with limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=1):
            pytest.fail("two at once")
    now[0] += 31
    async with limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=1):
        await held.__aexit__(None, None, None)  # it was not dead: what it settles late changes nothing
        await dead.wait_settled()
        with pytest.raises(RateLimitedError):
            async with limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=1):
                pytest.fail("two at once")
    await dead.close()
    await alive.close()


async def test_nobody_is_called_like_the_leases_of_another(new_world):
    world = new_world({"per": "subject", "concurrent": 1})
    async with world.reserve(new_principal(subject="ana")):
        await world.spend(new_principal(subject="ana:run"))
        async with world.reserve(new_principal(subject="ana:run")):
            pass
    await world.settled()
    await world.spend(new_principal(subject="ana"))


@pytest.mark.parametrize("limit", [{"requests_per_minute": 1}, {"tokens_per_day": 20}])
async def test_a_clock_set_back_by_a_moment_opens_no_window_anew(new_world, limit):
    world = new_world({"per": "key"} | limit)
    world.now_s = NOON_S + 43200 + 0.5  # just after midnight
    await world.spend(used=10)
    world.now_s -= 1
    with pytest.raises(RateLimitedError):
        await world.spend(used=10)
    world.now_s -= 7 * 86400  # it was wrong by a week: it is believed again
    await world.spend(used=10)


async def test_a_redis_that_was_emptied_is_told_what_the_store_knows(redis_server):
    await flush(redis_server)
    book = parse_limits({"limits": [{"per": "tenant", "tokens_per_day": 100}], "max_wait_s": 0})
    replicas = []
    for _ in range(2):
        ledger = SharedLedger(redis_server.url, book)
        limits = LimitedUse(book, ledger=ledger, usage=UsageBook())
        known: list[tuple[str, str, int, int, int]] = []

        async def refill(ledger=ledger, known=known):
            await ledger.adopt(book, known)

        ledger.refill = refill
        await refill()
        replicas.append((ledger, limits, known))
    (ledger, limits, known), (other, others, _) = replicas

    async def spend(by, of):
        async with of.reserve(new_principal(), REQUEST, prompt_tokens=30, max_tokens=30) as held:
            held.settle(Outcome("completed", usage=Usage(30, 30)))
        await by.wait_settled()

    await spend(ledger, limits)
    known.append(("tenant", "acme", 60, 0, 0))
    await flush(redis_server)
    answers = await asyncio.gather(spend(ledger, limits), spend(ledger, limits), return_exceptions=True)
    assert [type(answer) for answer in answers] == [RateLimitedError, RateLimitedError]
    with pytest.raises(RateLimitedError):  # the other replica tells what it knows, too, and takes nothing back
        await spend(other, others)
    assert await counted(redis_server) == 60

    async def fail():
        raise UnavailableError("The store does not answer.")

    await flush(redis_server)
    ledger.refill = fail
    with pytest.raises(UnavailableError):
        await spend(ledger, limits)
    await ledger.close()
    await other.close()


async def test_one_who_leaves_while_redis_counts_takes_nothing(redis_server):
    await flush(redis_server)
    book = parse_limits({"limits": [{"per": "tenant", "tokens_per_day": 100, "concurrent": 1}], "max_wait_s": 0})
    ledger = SharedLedger(redis_server.url, book)
    limits = LimitedUse(book, ledger=ledger, usage=UsageBook())

    async def hold():
        async with limits.reserve(new_principal(), REQUEST, prompt_tokens=50, max_tokens=50):
            await asyncio.sleep(60)

    await ledger.adopt(book, ())  # connected from here on
    for _ in range(20):
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        deadline_s = time.monotonic() + 30
        while ledger._taking or ledger._settling:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.001)
    assert await counted(redis_server) == 0
    async with limits.reserve(new_principal(), REQUEST, prompt_tokens=50, max_tokens=50):
        pass
    await ledger.close()


async def test_what_is_settled_after_its_lease_ran_out_still_counts_as_used(redis_server):
    await flush(redis_server)
    now = [NOON_S]
    book = parse_limits({"limits": [{"per": "tenant", "tokens_per_day": 100, "concurrent": 5}], "max_wait_s": 0})
    ledger = SharedLedger(redis_server.url, book, clock=lambda: now[0])
    limits = LimitedUse(book, ledger=ledger, usage=UsageBook())
    async with limits.reserve(new_principal(), REQUEST, prompt_tokens=10, max_tokens=80) as held:
        now[0] += 31  # Redis was away for so long, say
        async with limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=1):
            pass
        held.settle(Outcome("completed", usage=Usage(10, 1)))
    await ledger.wait_settled()
    assert await counted(redis_server) == 11
    now[0] += 7200
    async with (
        limits.reserve(new_principal(), REQUEST, prompt_tokens=1, max_tokens=1),
        Redis.from_url(redis_server.url) as redis,
    ):
        assert await redis.zcard("strongroom:running:strongroom:limits:tenant:acme") == 1
    await ledger.close()


REPLICA = """
import asyncio, sys
sys.path[:0] = ["."]
from server.errors import RateLimitedError
from server.policy.budget import LimitedUse, UsageBook
from server.policy.limit_file import parse_limits
from server.policy.shared_ledger import SharedLedger
from server.types import Chat, ModelRequest, Outcome, Principal, SubjectId, TenantId, Usage, WireFormat

url, budget, hangs = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "hang"
book = parse_limits({"limits": [{"per": "tenant", "tokens_per_day": budget}], "max_wait_s": 0})
request = ModelRequest(WireFormat.CHAT, "m", Chat(()), {})

async def write(limits, number, spent):
    who = Principal(SubjectId(f"s{number}"), TenantId("acme"), frozenset(), frozenset(), "api_key", f"k{number}")
    refused = 0
    while refused < 3:
        try:
            async with limits.reserve(who, request, prompt_tokens=10, max_tokens=30) as held:
                await asyncio.sleep(0.002)
                if hangs and number == 0:
                    print("holding", flush=True)
                    await asyncio.sleep(600)
                held.settle(Outcome("completed", usage=Usage(10, number % 30)))
                spent.append(10 + number % 30)
        except RateLimitedError as error:
            assert error.status == 429 and error.retry_after_s >= 1
            refused += 1
            await asyncio.sleep(0.01)

async def main():
    ledger = SharedLedger(url, book)
    limits = LimitedUse(book, ledger=ledger, usage=UsageBook())
    spent = []
    await asyncio.gather(*[write(limits, number, spent) for number in range(25)])
    await ledger.close()
    print(sum(spent), flush=True)

asyncio.run(main())
"""


async def test_fifty_writers_on_two_replicas_never_spend_more_than_the_budget(redis_server):
    await flush(redis_server)
    budget = 20_000
    replicas = [start_replica(redis_server, budget, "run") for _ in range(2)]
    spent = [int(replica.communicate(timeout=120)[0].split()[-1]) for replica in replicas]
    assert budget - 40 * 50 <= sum(spent) <= budget
    assert await counted(redis_server) == sum(spent)


async def test_what_a_killed_replica_held_stays_counted(redis_server):
    await flush(redis_server)
    dying = start_replica(redis_server, 1_000_000, "hang")
    assert dying.stdout is not None
    assert dying.stdout.readline() == "holding\n"
    before = -1
    while before != (now := await counted(redis_server)):  # what was settled behind its last answers may still arrive
        before = now
        await asyncio.sleep(0.3)
    dying.kill()
    dying.communicate()
    assert await counted(redis_server) >= before
    budget = await counted(redis_server) + 4_000
    survivor = start_replica(redis_server, budget, "run")
    spent = int(survivor.communicate(timeout=120)[0].split()[-1])
    assert 4_000 - 40 * 25 <= spent <= 4_000
    assert await counted(redis_server) <= budget


def start_replica(server, budget, mode):
    return subprocess.Popen(
        [sys.executable, "-c", REPLICA, server.url, str(budget), mode], stdout=subprocess.PIPE, text=True
    )


async def counted(server):
    async with Redis.from_url(server.url) as redis:
        return int(await redis.hget("strongroom:limits:tenant:acme", "td") or 0)


async def test_new_rules_keep_what_was_counted_and_count_what_the_store_knows(new_world):
    world = new_world({"per": "key", "tokens_per_day": 100})
    await world.spend(used=10)
    rules = [{"per": "key", "tokens_per_day": 30}, {"per": "tenant", "tokens_per_day": 1000}]
    book = parse_limits({"limits": rules, "max_wait_s": 0})
    await world.limits.adopt(book, [("key", "k1", 5, 0, 0), ("tenant", "acme", 990, 0, 0)])
    await world.spend(prompt=5, most=5, used=5)
    with pytest.raises(RateLimitedError):
        await world.spend(prompt=1, most=0)
    await world.limits.adopt(parse_limits({"limits": rules[:1], "max_wait_s": 0}), [("key", "k1", 30, 0, 0)])
    with pytest.raises(RateLimitedError, match="key"):
        await world.spend(prompt=1, most=0)
    await world.limits.adopt(parse_limits({"limits": [], "max_wait_s": 0}), ())
    await world.spend(prompt=1, most=5000)
