"""Over counts in memory and in Redis: a newer completion ends one that runs only when nothing can refuse it."""

import asyncio

import pytest

from server.errors import RateLimitedError, SupersededError
from server.policy.budget import LimitedUse, UsageBook
from server.policy.fairness import Fairness
from server.policy.limit_file import parse_limits
from server.policy.rate import MemoryLedger
from server.policy.shared_ledger import SharedLedger
from server.types import Completion, ModelRequest, Principal, SubjectId, TenantId, WireFormat
from tests.integration.redis_server import flush

BEFORE = "import os\n" + "".join(f"value_{n} = {n}\n" for n in range(60)) + "def total("
ANA = Principal(SubjectId("ana"), TenantId("acme"), frozenset(), frozenset({"*"}), "api_key", "k1")
BEN = Principal(SubjectId("ben"), TenantId("acme"), frozenset(), frozenset({"*"}), "api_key", "k2")


@pytest.fixture(params=["memory", "redis"])
async def new_limits(request):
    opened: list[SharedLedger] = []
    if request.param == "redis":
        await flush(request.getfixturevalue("redis_server"))

    def make(*rules, places=8, max_wait_s=0.5):
        book = parse_limits({"limits": list(rules), "max_wait_s": max_wait_s})
        completions = {"m": Fairness(places, reserved=0)}
        if request.param == "memory":
            return LimitedUse(book, ledger=MemoryLedger(book), usage=UsageBook(), completions=completions)
        opened.append(SharedLedger(request.getfixturevalue("redis_server").url, book))
        return LimitedUse(book, ledger=opened[-1], usage=UsageBook(), completions=completions)

    yield make
    for ledger in opened:
        await ledger.close()


class Typing:
    """One completion: it holds what it was given until it is told to end, or is ended."""

    def __init__(self, limits, typed="", who=ANA):
        request = ModelRequest(WireFormat.FIM, "m", Completion(BEFORE + typed, "\n\nprint(total())\n" * 20), {})
        self.is_running = asyncio.Event()
        self.may_end = asyncio.Event()
        self.task = asyncio.create_task(self._run(limits.reserve(who, request, prompt_tokens=5, max_tokens=5)))

    async def _run(self, held):
        async with held:
            self.is_running.set()
            await self.may_end.wait()

    async def ran(self):
        await asyncio.wait_for(self.is_running.wait(), 30)
        return self

    async def result(self):
        """What it raised; None where it ended well."""
        self.may_end.set()
        return (await asyncio.gather(self.task, return_exceptions=True))[0]


@pytest.mark.parametrize("rule", [{"requests_per_minute": 1}, {"tokens_per_day": 15}, {"tokens_per_minute": 15}])
async def test_a_newer_one_that_a_limit_refuses_ends_nothing(new_limits, rule):
    limits = new_limits({"per": "key"} | rule)
    old = await Typing(limits).ran()
    assert isinstance(await Typing(limits, "a").result(), RateLimitedError)
    assert not old.task.done()
    assert await old.result() is None


@pytest.mark.parametrize("max_wait_s", [0, 0.5])
async def test_a_newer_one_takes_over_the_place_among_running_requests(new_limits, max_wait_s):
    limits = new_limits({"per": "key", "concurrent": 1}, max_wait_s=max_wait_s)
    typed = [await Typing(limits).ran()]
    for text in ("a", "ab", "abc"):
        typed.append(await Typing(limits, text).ran())
        assert isinstance(await typed[-2].result(), SupersededError)
    assert await typed[-1].result() is None
    if isinstance(limits.ledger, SharedLedger):
        await limits.ledger.wait_settled()
    assert await (await Typing(limits).ran()).result() is None  # nothing is left taken
    assert limits.completions["m"].num_running == 0


async def test_a_newer_one_that_finds_no_place_ends_none_of_another(new_limits):
    limits = new_limits({"per": "tenant", "concurrent": 1}, max_wait_s=0.05)
    other = await Typing(limits, who=BEN).ran()
    assert isinstance(await Typing(limits, "a").result(), RateLimitedError)
    assert await other.result() is None


@pytest.mark.parametrize("max_wait_s", [0, 0.5])
async def test_a_newer_one_takes_over_the_place_in_the_engine(new_limits, max_wait_s):
    limits = new_limits(places=1, max_wait_s=max_wait_s)
    typed = [await Typing(limits).ran()]
    for text in ("a", "ab", "abc"):
        typed.append(await Typing(limits, text).ran())
        assert isinstance(await typed[-2].result(), SupersededError)
        assert limits.completions["m"].num_running == 1
    assert await typed[-1].result() is None
    assert limits.completions["m"].num_running == 0


async def test_one_that_waits_leaves_the_queue_for_a_newer_one(new_limits):
    limits = new_limits(places=1, max_wait_s=30)
    other = await Typing(limits, who=BEN).ran()
    waiting = [Typing(limits)]
    while limits.completions["m"].num_waiting < 1:  # noqa: ASYNC110 - the queue tells nobody
        await asyncio.sleep(0.001)
    waiting.append(Typing(limits, "a"))
    assert isinstance(await waiting[0].result(), SupersededError)
    assert limits.completions["m"].num_waiting == 1
    assert await other.result() is None
    await waiting[1].ran()
    assert await waiting[1].result() is None
    assert limits.completions["m"].num_running == 0
