"""Whatever comes in whatever order: budgets hold, nothing is counted twice or lost, parsers never crash."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ConfigError
from server.policy.limit_file import LimitBook, Price, Rule, parse_limits
from server.policy.rate import Grant, MemoryLedger

START_S = 1_800_000_000.0
steps = st.lists(
    st.tuples(st.floats(0, 90), st.integers(1, 60), st.integers(0, 60), st.booleans()), min_size=1, max_size=60
)


@given(steps)
@settings(deadline=None)
def test_a_day_never_spends_more_than_its_budget(sequence):
    async def run():
        now_s = START_S // 86400 * 86400
        book = LimitBook({("key", ""): Rule(tokens_per_day=200, concurrent=3)}, {"*": Price()})
        ledger = MemoryLedger(book, clock=lambda: now_s)
        account = ledger.account("key", "k")
        assert account is not None
        held: list[tuple[Grant, int]] = []
        spent = 0
        for wait_s, most, used, finishes in sequence:
            now_s += wait_s
            taken = await ledger.take((account,), most, 0)
            if isinstance(taken, Grant):
                held.append((taken, min(used, most)))
            assert account.running == len(held) <= 3
            if finishes and held:
                grant, really = held.pop(0)
                ledger.settle(grant, really, 0)
                spent += really
            assert account.tokens_day == spent + sum(grant.num_tokens for grant, _ in held)
            assert account.tokens_day <= 200
        for grant, really in held:
            ledger.settle(grant, really, 0)
        assert account.running == 0

    asyncio.run(run())


@given(steps)
@settings(deadline=None)
def test_what_a_shortage_tells_is_true(sequence):
    """Whoever waits as long as it was told, while nothing else comes, is let in."""

    async def run():
        now_s = START_S
        book = LimitBook({("key", ""): Rule(requests_per_minute=5, tokens_per_minute=100)}, {"*": Price()})
        ledger = MemoryLedger(book, clock=lambda: now_s)
        account = ledger.account("key", "k")
        assert account is not None
        for wait_s, most, _used, _finishes in sequence:
            now_s += wait_s
            taken = await ledger.take((account,), most, 0)
            for _ in range(2):  # the requests' wait may end before the tokens'
                if not isinstance(taken, Grant):
                    assert 0 < taken.wait_s <= 120
                    now_s += taken.wait_s + 0.002
                    taken = await ledger.take((account,), most, 0)
            assert isinstance(taken, Grant)
            ledger.settle(taken, most, 0)

    asyncio.run(run())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8)
    | st.sampled_from(["key", "team", "concurrent"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["limits", "prices", "per", "name", "concurrent", "cost_per_day", "prompt", "max_wait_s", "m"]),
        inner,
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@given(values)
def test_the_limits_file_is_read_or_refused(document):
    try:
        book = parse_limits(document)
    except ConfigError:
        return
    assert all(name in ("key", "subject", "team", "tenant", "model") for name, _ in book.rules)


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.floats(0, 100), st.floats(0, 100))
def test_a_price_is_never_rounded_down(prompt, completion, prompt_price, completion_price):
    cost = Price(prompt_price, completion_price).cost_micros(prompt, completion)
    exact = prompt * prompt_price + completion * completion_price
    assert exact <= cost + 1e-6
    assert cost < exact + 1 + 1e-6
