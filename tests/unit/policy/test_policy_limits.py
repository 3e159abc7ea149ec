"""Limits: windows, budgets, waiting, fairness, usage."""

import asyncio
import dataclasses
import math
from contextlib import aclosing

import pytest
import yaml

from server.errors import ConfigError, RateLimitedError, UnavailableError
from server.follow import follow
from server.policy.budget import LimitedUse, UsageBook, sum_used
from server.policy.fairness import Fairness
from server.policy.limit_file import load_limits, parse_limits
from server.policy.limits_in_force import LimitsInForce
from server.policy.rate import MemoryLedger, Window
from server.store.database import Store
from server.types import Chat, Delta, ModelRequest, Outcome, Principal, SubjectId, TenantId, Usage, WireFormat

NOON_S = 1_800_000_000.0 // 86400 * 86400 + 43200


def new_principal(key="k1", subject="ana", tenant="acme", groups=("developers",)):
    return Principal(SubjectId(subject), TenantId(tenant), frozenset(groups), frozenset({"*"}), "api_key", key)


REQUEST = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "x"},)), {})


class World:
    """Limits with a clock that is moved by hand."""

    def __init__(self, *limits, prices=None, max_wait_s=0, engines=None):
        self.now_s = NOON_S
        book = parse_limits({"limits": list(limits), "prices": prices or {}, "max_wait_s": max_wait_s})
        self.ledger = MemoryLedger(book, clock=lambda: self.now_s)
        self.usage = UsageBook(clock=lambda: self.now_s)
        self.limits = LimitedUse(book, ledger=self.ledger, usage=self.usage, engines=engines)

    def reserve(self, principal=None, prompt=10, most=10):
        return self.limits.reserve(principal or new_principal(), REQUEST, prompt_tokens=prompt, max_tokens=most)

    async def spend(self, principal=None, prompt=10, most=10, used=None):
        async with self.reserve(principal, prompt, most) as held:
            if used is not None:
                held.settle(Outcome("completed", usage=Usage(prompt, used)))
        return held


async def test_use_before_the_start_counts(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path / 's.db'}")
    limit = {"per": "team", "tokens_per_day": 50}
    world = World(limit)
    await world.spend(used=20)
    assert world.usage.flush(store) == 1
    assert world.usage.flush(store) == 0
    again = World(limit)
    await again.ledger.adopt(again.limits.book, sum_used(store, again.now_s))
    await again.spend(prompt=10, most=10)
    with pytest.raises(RateLimitedError):
        await again.spend(prompt=10, most=11)
    store.close()


async def test_usage_that_cannot_be_written_is_kept(tmp_path):
    store = Store.open(f"sqlite:///{tmp_path / 's.db'}")
    world = World()
    await world.spend(used=20)
    with store.write() as connection:
        connection.exec_driver_sql("ALTER TABLE usage RENAME TO away")
    with pytest.raises(UnavailableError):
        world.usage.flush(store)
    await world.spend(used=1)
    with store.write() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO usage")
    world.usage.flush(store)
    (found,) = list(sum_used(store, world.now_s))[:1]
    assert found[2] == 41
    store.close()


def test_a_window_slides():
    window = Window()
    assert window.used(120.0) == 0
    window.current = 60
    assert window.used(150.0) == 60
    assert window.used(180.0) == 60
    assert window.used(210.0) == 30
    assert window.used(400.0) == 0
    assert window.wait_s(11, 10, 400.0) == math.inf


@pytest.mark.parametrize("used", [1, 5, 10])
@pytest.mark.parametrize("num", [1, 4, 10])
@pytest.mark.parametrize("offset_s", [0.0, 17.0, 59.0])
def test_the_wait_told_is_enough_and_not_far_too_long(used, num, offset_s):
    window = Window()
    start_s = 600.0 + offset_s
    window.used(start_s)
    window.current = used
    wait_s = window.wait_s(num, 10, start_s)
    if wait_s:
        assert window.used(start_s + wait_s * 0.95) + num > 10
    assert window.used(start_s + wait_s + 0.001) + num <= 10 + 1e-6


async def test_a_newcomer_finds_a_place_however_full_another_has_made_it():
    engine = Fairness(8)
    for _ in range(6):
        await engine.acquire("flood", max_wait_s=1)
    waiting = [asyncio.create_task(engine.acquire("flood", max_wait_s=5)) for _ in range(50)]
    await asyncio.sleep(0)
    assert engine.num_waiting == 50
    await asyncio.wait_for(engine.acquire("calm", max_wait_s=1), timeout=0.5)
    assert engine.num_running == 7
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert engine.num_waiting == 0


async def test_a_free_place_goes_to_who_runs_the_fewest():
    engine = Fairness(4, reserved=0)
    for _ in range(4):
        await engine.acquire("a", max_wait_s=1)
    order = []

    async def wait(tenant):
        await engine.acquire(tenant, max_wait_s=5)
        order.append(tenant)

    tasks = []
    for tenant in ("a", "a", "b", "c"):
        tasks.append(asyncio.create_task(wait(tenant)))
        await asyncio.sleep(0)
    for _ in range(3):
        engine.release("a")
        await asyncio.sleep(0.001)
    assert order == ["b", "c", "a"]
    engine.release("a")
    await asyncio.gather(*tasks)


async def test_a_full_engine_refuses_in_bounded_time_and_counts_right():
    engine = Fairness(1, max_waiting=1)
    await engine.acquire("a", max_wait_s=1)
    waiting = asyncio.create_task(engine.acquire("a", max_wait_s=0.05))
    await asyncio.sleep(0)
    with pytest.raises(RateLimitedError) as caught:
        await engine.acquire("a", max_wait_s=1)
    assert caught.value.code == "engine_full"
    with pytest.raises(RateLimitedError):
        await waiting
    engine.release("a")
    assert (engine.num_running, engine.num_waiting) == (0, 0)


async def test_limits_are_given_back_when_the_engine_stays_full():
    engine = Fairness(1)
    world = World({"per": "key", "concurrent": 2}, engines={"m": engine}, max_wait_s=0.02)
    async with world.reserve():
        for _ in range(5):
            with pytest.raises(RateLimitedError, match="engine is full"):
                await world.spend()
    assert engine.num_running == 0
    await world.spend()


@pytest.mark.parametrize(
    "document",
    [
        [], {"limits": {}}, {"limits": [{"per": "planet", "concurrent": 1}]}, {"limits": [{"per": "key"}]},
        {"limits": [{"per": "key", "concurrent": 0}]}, {"limits": [{"per": "key", "concurrent": True}]},
        {"limits": [{"per": "key", "speed": 1}]}, {"limits": [{"per": "key", "concurrent": 1}] * 2},
        {"prices": {"m": {"prompt": -1}}}, {"prices": {"m": 3}}, {"colour": 1}, {"max_wait_s": "long"},
        {"limits": [{"per": "key", "name": 3, "concurrent": 1}]}, {"limits": [{"per": "key", "cost_per_day": "1"}]},
    ],
)  # fmt: skip
def test_a_bad_limits_file_is_refused(document):
    with pytest.raises(ConfigError):
        parse_limits(document)


def test_the_default_limits_file_is_good(tmp_path):
    from pathlib import Path

    assert load_limits(Path("configs/policy/limits.yaml")).rule("key", "any") is not None
    with pytest.raises(ConfigError):
        load_limits(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError):
        load_limits(tmp_path / "bad.yaml")


async def engine_says(*batches, error=None):
    for batch in batches:
        yield batch
    if error is not None:
        raise error


def token():
    return Delta(text="x")


async def take_and_leave(world, deltas, num_batches):
    """One request whose caller leaves, or whose answer is blocked, after so many batches."""
    async with world.reserve(prompt=10, most=50) as held, aclosing(held.watch(deltas, Outcome())) as seen:
        for _ in range(num_batches):
            await anext(seen)
        raise ConnectionError("gone")


@pytest.mark.parametrize(
    ("batches", "num_taken", "charged"),
    [
        ([[token()], [token(), token()], [token()]], 2, 13),
        ([[token()], [Delta(finish_reason="stop", usage=Usage(9, 7))]], 2, 16),
        ([[token()]], 0, 0),
        ([[Delta(text="a = 1\n" * 16)], [Delta(text="b = 2\n" * 16)]], 2, 58),  # events of 24 tokens, as plain ones are
    ],
)
async def test_an_answer_that_is_never_settled_is_charged_for_what_was_computed(batches, num_taken, charged):
    world = World({"per": "key", "tokens_per_day": 1000, "concurrent": 1})
    with pytest.raises(ConnectionError):
        await take_and_leave(world, engine_says(*batches), num_taken)
    account = world.ledger.account("key", "k1")
    assert account is not None
    assert account.tokens_day == charged
    assert account.running == 0


async def repair_and_be_blocked(world, outcome):
    """One request whose answer is whole, but blocked although the model was asked again."""
    said = engine_says([token()], [Delta(finish_reason="stop", usage=Usage(9, 7))])
    async with world.reserve(prompt=10, most=50) as held, aclosing(held.watch(said, outcome)) as seen:
        outcome.extra_usage.add(Usage(20, 5))
        async for batch in seen:
            outcome.absorb(batch)
        raise ConnectionError("blocked")


async def test_repairs_of_an_answer_that_is_blocked_are_charged_once():
    world = World({"per": "key", "tokens_per_day": 1000})
    outcome = Outcome()
    with pytest.raises(ConnectionError):
        await repair_and_be_blocked(world, outcome)
    account = world.ledger.account("key", "k1")
    assert account is not None
    assert account.tokens_day == 9 + 7 + 20 + 5
    assert (outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == (29, 12)


async def test_an_engine_that_did_not_answer_costs_nothing():
    world = World({"per": "key", "tokens_per_day": 1000})
    with pytest.raises(UnavailableError):
        await take_and_leave(world, engine_says(error=UnavailableError("down")), 1)
    account = world.ledger.account("key", "k1")
    assert account is not None
    assert account.tokens_day == 0


async def test_every_choice_is_held():
    world = World({"per": "key", "tokens_per_day": 100})
    many = dataclasses.replace(REQUEST, sampling={"n": 4})
    with pytest.raises(RateLimitedError):
        async with world.limits.reserve(new_principal(), many, prompt_tokens=10, max_tokens=30):
            pytest.fail("it holds 130")


def write_limits(path, *limits, **changes):
    path.write_text(yaml.safe_dump({"limits": list(limits), "max_wait_s": 0} | changes))


async def test_a_changed_limits_file_is_followed_and_a_bad_one_refused(tmp_path):
    path = tmp_path / "limits.yaml"
    store = Store.open(f"sqlite:///{tmp_path / 's.db'}")
    log = []

    async def record(event, **fields):
        log.append((event, fields))

    write_limits(path, {"per": "key", "tokens_per_day": 1000})
    world = World()
    in_force = LimitsInForce(world.limits, path, store, clock=lambda: world.now_s)
    await in_force.adopt(in_force.read_next())
    first = in_force.current.digest
    await world.spend(used=10)
    task = asyncio.create_task(follow(in_force, "admin:budget:changed", record, interval_s=0.01))

    async def wait_for(check):
        for _ in range(3000):
            if check():
                return
            await asyncio.sleep(0.01)
        pytest.fail("the change was not seen")

    await asyncio.sleep(0)
    path.write_text("limits: {per: key}")
    await wait_for(lambda: len(log) == 1)
    assert log[0][1]["refused"]
    assert in_force.current.digest == first
    path.unlink()
    await wait_for(lambda: len(log) == 2)
    assert log[1][1]["refused"]
    # A rule that is new counts what the store knows; one that was there keeps its count.
    write_limits(path, {"per": "key", "tokens_per_day": 100}, {"per": "tenant", "tokens_per_day": 30})
    await wait_for(lambda: in_force.current.digest not in (first, ""))
    assert log[2][1]["before"] == first
    assert log[2][1]["after"] == in_force.current.digest
    await world.spend(prompt=5, most=5, used=5)
    with pytest.raises(RateLimitedError, match="tenant"):
        await world.spend(prompt=1, most=0)
    write_limits(path, {"per": "key", "tokens_per_day": 31})
    await wait_for(lambda: len(log) == 4 and in_force.current.digest == log[3][1]["after"])
    await world.spend(prompt=1, most=0, used=0)
    with pytest.raises(RateLimitedError, match="key"):
        await world.spend(prompt=1, most=0)
    task.cancel()
    store.close()


async def test_who_waits_for_a_place_goes_on_under_new_rules():
    world = World({"per": "key", "concurrent": 1}, max_wait_s=60)
    async with world.reserve():
        waiting = asyncio.create_task(world.spend(used=1))
        for _ in range(10):
            await asyncio.sleep(0)
        assert world.limits.waiting
        await world.limits.adopt(parse_limits({"max_wait_s": 0}), ())
        await asyncio.wait_for(waiting, timeout=30)
    assert not world.limits.waiting
