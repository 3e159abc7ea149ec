"""Reserve before, settle after: the limits of a request, the place it takes in the engine, and the usage it leaves."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import deque
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, Self

from server.errors import RateLimitedError, UnavailableError
from server.policy.rate import DAY_S, Grant, Shortage
from server.policy.supersede import Completions
from server.store.usage import HOUR_S, Spent, UsageKey, add_usage, list_usage
from server.types import Completion, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from server.policy.fairness import Fairness
    from server.policy.limit_file import LimitBook
    from server.policy.rate import Account
    from server.policy.supersede import Running
    from server.store.database import Store
    from server.types import Delta, ModelRequest, Outcome, Principal

# The SDKs wait as long as Retry-After says up to two minutes; beyond that, trying again is of no use.
MAX_RETRY_S = 120
FLUSH_S = 5.0
_WORDS = {
    "requests": "requests a minute",
    "tokens": "tokens a minute",
    "concurrent": "requests at once",
    "tokens_day": "tokens a day",
    "cost_day": "spending a day",
    "cost_month": "spending a month",
}


class Ledger(Protocol):
    """Who has used what: `rate.MemoryLedger` for one process, `shared_ledger.SharedLedger` for several replicas.

    Attributes:
        poll_s: How often a request that waits for a place looks again by itself; None where every release is seen.
    """

    poll_s: float | None

    def account(self, dimension: str, name: str) -> Account | None:
        """Return the account of this name; None where no rule limits it."""
        ...

    async def adopt(self, book: LimitBook, totals: Iterable[tuple[str, str, int, int, int]]) -> None:
        """Put rules in force, over what was used before."""
        ...

    async def take(
        self,
        accounts: tuple[Account, ...],
        num_tokens: int,
        cost_micros: int,
        num_requests: int = 1,
        instead: Grant | None = None,
    ) -> Grant | Shortage:
        """Take what a request may use from every account, or nothing; `instead`'s place among running ones is free."""
        ...

    def settle(self, grant: Grant, num_tokens: int, cost_micros: int) -> None:
        """Replace what was taken by what was used."""
        ...


class UsageBook:
    """What was used, by hour; written to the store every few seconds by a thread.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._spent: dict[UsageKey, Spent] = {}
        self._teams: dict[frozenset[str], str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, principal: Principal, model: str, prompt_tokens: int, completion_tokens: int, cost: int) -> None:
        """Count one request that has ended."""
        key = UsageKey(
            int(self._clock() // HOUR_S),
            principal.tenant,
            principal.subject,
            principal.credential_id,
            self._name_teams(principal.groups),
            model,
        )
        with self._lock:
            spent = self._spent.get(key)
            if spent is None:
                spent = self._spent[key] = Spent()
            spent.requests += 1
            spent.prompt_tokens += prompt_tokens
            spent.completion_tokens += completion_tokens
            spent.cost_micros += cost

    def _name_teams(self, groups: frozenset[str]) -> str:
        known = self._teams.get(groups)
        if known is None:
            known = json.dumps(sorted(groups), ensure_ascii=False, separators=(",", ":"))
            if len(self._teams) >= 4096:
                self._teams.clear()
            self._teams[groups] = known
        return known

    def flush(self, store: Store) -> int:
        """Write what came since the last time; return the number of rows. What can't be written is kept.

        Raises:
            UnavailableError: The store does not answer.
        """
        with self._lock:
            taken, self._spent = self._spent, {}
        if not taken:
            return 0
        try:
            with store.write() as connection:
                add_usage(connection, taken)
        except UnavailableError:
            with self._lock:
                for key, spent in taken.items():
                    now = self._spent.setdefault(key, Spent())
                    now.requests += spent.requests
                    now.prompt_tokens += spent.prompt_tokens
                    now.completion_tokens += spent.completion_tokens
                    now.cost_micros += spent.cost_micros
            raise
        return len(taken)

    def start(self, store: Store) -> None:
        """Write in a thread from now on."""

        def run() -> None:
            while not self._stop.wait(FLUSH_S):
                try:
                    self.flush(store)
                except UnavailableError:
                    continue  # kept, and tried again next time

        self._thread = threading.Thread(target=run, name="usage-flush", daemon=True)
        self._thread.start()

    def stop(self, store: Store) -> None:
        """End the thread and write the rest.

        Raises:
            UnavailableError: The store does not answer.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self.flush(store)


def sum_used(store: Store, now_s: float) -> Iterator[tuple[str, str, int, int, int]]:
    """Yield what each account used today and this month, for `Ledger.adopt`.

    Raises:
        UnavailableError: The store does not answer.
    """
    today = datetime.fromtimestamp(now_s, tz=UTC)
    month_starts_s = datetime(today.year, today.month, 1, tzinfo=UTC).timestamp()
    day_hour = int(now_s // DAY_S) * 24
    totals: dict[tuple[str, str], list[int]] = {}
    with store.read() as connection:
        rows = list_usage(connection, from_hour=int(month_starts_s // HOUR_S), to_hour=int(now_s // HOUR_S) + 1)
    for key, spent in rows:
        names = [("key", key.key_id), ("subject", _subject(key.tenant, key.subject)), ("tenant", key.tenant)]
        names += [("team", f"{key.tenant}/{team}") for team in json.loads(key.teams)]
        for account in [*names, ("model", key.model)]:
            total = totals.setdefault(account, [0, 0, 0])
            if key.hour >= day_hour:
                total[0] += spent.prompt_tokens + spent.completion_tokens
                total[1] += spent.cost_micros
            total[2] += spent.cost_micros
    for (dimension, name), (tokens_day, cost_day, cost_month) in totals.items():
        yield dimension, name, tokens_day, cost_day, cost_month


class LimitedUse:
    """Implements `ports.Limits`: nobody is exempt.

    Args:
        book: Rules and prices.
        ledger: Who has used what.
        usage: Where what was used is written down.
        engines: The places of each model's engine; a model that is not in it has no queue.
        completions: Places of their own for completions: a key stroke must not wait behind conversations.
    """

    def __init__(
        self,
        book: LimitBook,
        *,
        ledger: Ledger,
        usage: UsageBook,
        engines: Mapping[str, Fairness] | None = None,
        completions: Mapping[str, Fairness] | None = None,
    ) -> None:
        self.book = book
        self.ledger = ledger
        self.usage = usage
        self.engines = engines or {}
        self.completions = completions or {}
        self.typing = Completions()
        self.waiting: dict[int, deque[asyncio.Future[None]]] = {}
        self._accounts: dict[tuple[Principal, str], tuple[Account, ...]] = {}

    def reserve(self, principal: Principal, request: ModelRequest, *, prompt_tokens: int, max_tokens: int) -> Held:
        """Hold what the request may cost; on exit what the engine did not compute is given back.

        Raises:
            RateLimitedError: On entering: a limit or a budget is spent, or the engine stays full.
        """
        num_choices = request.sampling.get("n") or 1
        return Held(self, principal, request, prompt_tokens, max_tokens * int(num_choices))

    @asynccontextmanager
    async def visit(
        self, principal: Principal, model: str = "", num_requests: int = 1
    ) -> AsyncGenerator[dict[str, str], None]:
        """Count a request for which no model computes, and its place among running ones; yield the headers of limits.

        A batch counts as `num_requests` and takes one place.

        Raises:
            RateLimitedError: On entering: a limit is spent.
        """
        taken = await self.take(self.accounts(principal, model), 0, 0, num_requests)
        try:
            yield taken.headers
        finally:
            self.ledger.settle(taken, 0, 0)
            self.wake(taken.accounts)

    async def take(
        self,
        accounts: tuple[Account, ...],
        num_tokens: int,
        cost: int,
        num_requests: int = 1,
        newer: Running | None = None,
    ) -> Grant:
        """Take what a request may use, waiting for it as long as the book allows.

        Raises:
            RateLimitedError: There is no room, and waiting that long is of no use.
        """
        taken = await self.ledger.take(accounts, num_tokens, cost, num_requests)
        if newer is not None and isinstance(taken, Shortage) and taken.kind == "concurrent":
            # What it lacks is a place, and the completions that it makes stale hold or want one.
            for older in self.typing.stale(newer):
                if older.grant is None:
                    older.end()
                elif isinstance(taken, Shortage):
                    taken = await self.ledger.take(accounts, num_tokens, cost, num_requests, instead=older.grant)
        if isinstance(taken, Shortage):
            return await self._wait(accounts, num_tokens, cost, num_requests, taken)
        return taken

    def queue(self, request: ModelRequest) -> Fairness | None:
        """Return where a request waits for its place in the engine; None where there is no queue."""
        queues = self.completions if isinstance(request.payload, Completion) else self.engines
        return queues.get(request.model) or self.engines.get(request.model)

    def accounts(self, principal: Principal, model: str) -> tuple[Account, ...]:
        """Return the accounts that a request counts against, remembered by principal."""
        known = self._accounts.get((principal, model))
        if known is None:
            ledger = self.ledger
            found = [
                ledger.account("key", principal.credential_id),
                ledger.account("subject", _subject(principal.tenant, principal.subject)),
                *(ledger.account("team", f"{principal.tenant}/{team}") for team in sorted(principal.groups)),
                ledger.account("tenant", principal.tenant),
                ledger.account("model", model) if model else None,
            ]
            known = tuple(account for account in found if account is not None)
            if len(self._accounts) >= 65536:
                self._accounts.clear()
            self._accounts[(principal, model)] = known
        return known

    async def adopt(self, book: LimitBook, totals: Iterable[tuple[str, str, int, int, int]]) -> None:
        """Put rules and prices in force; what runs or waits goes on, those who wait under the new rules.

        Raises:
            UnavailableError: The counts can't be reached; the old rules stay.
        """
        await self.ledger.adopt(book, totals)
        self.book = book
        self._accounts.clear()
        for queue in self.waiting.values():
            for place in queue:
                if not place.done():
                    place.set_result(None)

    def wake(self, accounts: tuple[Account, ...]) -> None:
        """Let one that waits for each of these accounts try again."""
        if not self.waiting:
            return
        for account in accounts:
            queue = self.waiting.get(id(account))
            while queue:
                place = queue.popleft()
                if not place.done():
                    place.set_result(None)
                    break

    async def _wait(
        self, accounts: tuple[Account, ...], num_tokens: int, cost: int, num_requests: int, short: Shortage
    ) -> Grant:
        """Wait for a shortage to pass, as long as the book allows: a client that is refused comes back thrice."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.book.max_wait_s
        while True:
            left_s = deadline_s - loop.time()
            if left_s <= 0 or short.wait_s > left_s:
                raise _refusal(short)
            if short.kind == "concurrent":
                await self._wait_for_place(accounts, left_s)
            else:
                await asyncio.sleep(short.wait_s)
            taken = await self.ledger.take(accounts, num_tokens, cost, num_requests)
            if not isinstance(taken, Shortage):
                return taken
            self.wake(accounts)  # the place that woke us is of no use to us: let the next one try
            short = taken

    async def _wait_for_place(self, accounts: tuple[Account, ...], left_s: float) -> None:
        waiting = self.waiting
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        poll_s = self.ledger.poll_s
        full = [
            one
            for one in accounts
            if one.rule.concurrent is not None and (poll_s is not None or one.running >= one.rule.concurrent)
        ]
        for account in full:
            waiting.setdefault(id(account), deque()).append(place)
        # Where places are polled for, those who wait longest look most often: a crowd must not keep Redis busy.
        look_s = (
            left_s if poll_s is None else min(left_s, poll_s * max((len(waiting[id(one)]) for one in full), default=1))
        )
        try:
            await asyncio.wait([place], timeout=look_s)
        finally:
            for account in full:
                queue = waiting.get(id(account))
                if queue is not None and place in queue:
                    queue.remove(place)
                if not queue:
                    waiting.pop(id(account), None)


class Held:
    """What one request holds while it runs; implements `ports.Reservation`."""

    __slots__ = (
        "_completion_tokens",
        "_extra_cost",
        "_extra_tokens",
        "_grant",
        "_has_begun",
        "_is_settled",
        "_limits",
        "_model",
        "_num_chars",
        "_num_seen",
        "_outcome",
        "_principal",
        "_prompt_tokens",
        "_request",
        "_running",
        "_seen",
        "headers",
    )

    def __init__(
        self,
        limits: LimitedUse,
        principal: Principal,
        request: ModelRequest,
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        self._limits = limits
        self._principal = principal
        self._request = request
        self._running: Running | None = None
        self._model = request.model
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = completion_tokens
        self._grant: Grant | None = None
        self._extra_tokens = 0  # of turns that `extend` held: settled by themselves
        self._extra_cost = 0
        self._is_settled = False
        self._has_begun = False
        self._num_seen = 0
        self._num_chars = 0
        self._seen: Usage | None = None
        self._outcome: Outcome | None = None
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._running = running = self._limits.typing.begin(self._principal, self._request)
        try:
            return await self._enter(running)
        except BaseException as error:
            self._give_back(running)
            if running.is_stale and isinstance(error, asyncio.CancelledError):
                raise running.settle() from None
            raise

    async def _enter(self, running: Running) -> Self:
        limits = self._limits
        accounts = limits.accounts(self._principal, self._model)
        cost = limits.book.price(self._model).cost_micros(self._prompt_tokens, self._completion_tokens)
        num_tokens = self._prompt_tokens + self._completion_tokens
        running.grant = self._grant = taken = await limits.take(accounts, num_tokens, cost, newer=running)
        self.headers = taken.headers
        for older in limits.typing.stale(running):
            if older.has_place and not running.has_place:
                older.has_place, running.has_place = False, True
            older.end()
        engine = limits.queue(self._request)
        if engine is not None and not running.has_place:
            await engine.acquire(self._principal.tenant, max_wait_s=limits.book.max_wait_s)
            running.has_place = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = self._running
        if running is None:
            return
        self._give_back(running)
        if running.is_stale and isinstance(error, asyncio.CancelledError | GeneratorExit):
            raise running.settle() from None

    def _give_back(self, running: Running) -> None:
        """Give back what is held: what the engine did not compute, the place in it, the one among running requests."""
        limits, grant = self._limits, self._grant
        limits.typing.forget(running)
        if grant is None:
            return
        if not self._is_settled:
            self._charge_seen(grant)
        engine = limits.queue(self._request)
        if engine is not None and running.has_place:
            running.has_place = False
            engine.release(self._principal.tenant)
        limits.wake(grant.accounts)

    async def watch(
        self, deltas: AsyncGenerator[list[Delta], None], outcome: Outcome
    ) -> AsyncGenerator[list[Delta], None]:
        """Yield what the engine says and count it.

        A caller who leaves before the end, and an answer that the guard blocks, have cost what they have cost; what is
        charged for them stands in `outcome` too.
        """
        self._has_begun, self._outcome = True, outcome
        try:
            async with aclosing(deltas):
                async for batch in deltas:
                    self._num_seen += len(batch)
                    for delta in batch:
                        self._num_chars += len(delta.text) + len(delta.reasoning)
                    if batch and (usage := batch[-1].usage) is not None:
                        self._seen = replace(usage)  # what travels on has the cost of repairs added to it
                    yield batch
        except UnavailableError:
            self._has_begun = self._num_seen > 0  # an engine that did not answer computed nothing
            raise

    @asynccontextmanager
    async def extend(self, *, prompt_tokens: int, max_tokens: int) -> AsyncGenerator[Usage, None]:
        """Hold what one more turn of the same request may cost; on exit what the caller put into the usage is charged.

        It counts as no other request and takes no other place, and nothing waits: the answer is held back meanwhile.

        Raises:
            RateLimitedError: On entering: no budget or limit of tokens holds it.
        """
        limits, grant, price = self._limits, self._grant, self._limits.book.price(self._model)
        assert grant is not None  # noqa: S101 - only an entered reservation is extended
        cost = price.cost_micros(prompt_tokens, max_tokens)
        taken = await limits.ledger.take(grant.accounts, prompt_tokens + max_tokens, cost, 0, instead=grant)
        if isinstance(taken, Shortage):
            raise _refusal(taken)
        spent = Usage()
        try:
            yield spent
        finally:
            num_tokens = spent.prompt_tokens + spent.completion_tokens
            cost = price.cost_micros(spent.prompt_tokens, spent.completion_tokens)
            self._extra_tokens += num_tokens
            self._extra_cost += cost
            limits.ledger.settle(taken, num_tokens, cost)
            limits.wake(taken.accounts)

    def settle(self, outcome: Outcome) -> None:
        """Replace the reservation by what was really used, once; of `outcome` what `extend` held is charged already."""
        if self._grant is not None and self._running is not None and not self._is_settled:
            self._limits.typing.forget(self._running)
            self._settle(self._grant, outcome.usage)

    def _charge_seen(self, grant: Grant) -> None:
        if self._has_begun:
            usage = self._seen or Usage.of_cut_off(self._prompt_tokens, self._num_seen, self._num_chars)
            if self._outcome is not None:
                usage.add(self._outcome.extra_usage)
                self._outcome.usage = usage
            self._settle(grant, usage)
        else:
            self._is_settled = True
            self._limits.ledger.settle(grant, 0, 0)

    def _settle(self, grant: Grant, usage: Usage) -> None:
        self._is_settled = True
        limits = self._limits
        cost = limits.book.price(self._model).cost_micros(usage.prompt_tokens, usage.completion_tokens)
        num_tokens = usage.prompt_tokens + usage.completion_tokens
        limits.ledger.settle(grant, num_tokens - self._extra_tokens, cost - self._extra_cost)
        limits.usage.add(self._principal, self._model, usage.prompt_tokens, usage.completion_tokens, cost)


def _refusal(short: Shortage) -> RateLimitedError:
    words = _WORDS[short.kind]
    if math.isinf(short.wait_s):
        return RateLimitedError(
            f"This request alone is more than this {short.dimension}'s limit of {words}; ask for less.",
            retry_after_s=MAX_RETRY_S,
            headers={"x-should-retry": "false"},
            code="request_over_limit",
        )
    seconds = max(1, math.ceil(short.wait_s))
    headers = {"x-should-retry": "false"} if seconds > MAX_RETRY_S else {}
    code = "insufficient_quota" if short.kind in ("tokens_day", "cost_day", "cost_month") else "rate_limit_exceeded"
    return RateLimitedError(
        f"This {short.dimension}'s limit of {words} is spent; it is free again in {seconds} s.",
        retry_after_s=seconds,
        headers=headers,
        code=code,
    )


def _subject(tenant: str, subject: str) -> str:
    return f"{tenant}/{subject}"
