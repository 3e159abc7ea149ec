"""Reserve before, settle after: the limits of a request, the place it takes in the engine, and the usage it leaves."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import deque
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, Self

from server.errors import RateLimitedError, UnavailableError
from server.policy.rate import DAY_S, Grant, Shortage
from server.store.usage import HOUR_S, Spent, UsageKey, add_usage, list_usage
from server.types import Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
    from types import TracebackType

    from server.policy.fairness import Fairness
    from server.policy.limit_file import LimitBook
    from server.policy.rate import Account
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

    async def take(self, accounts: tuple[Account, ...], num_tokens: int, cost_micros: int) -> Grant | Shortage:
        """Take what a request may use from every account, or nothing."""
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
    """Yield what each account used today and this month, for `MemoryLedger.load`.

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
    """

    def __init__(
        self,
        book: LimitBook,
        *,
        ledger: Ledger,
        usage: UsageBook,
        engines: Mapping[str, Fairness] | None = None,
    ) -> None:
        self.book = book
        self.ledger = ledger
        self.usage = usage
        self.engines = engines or {}
        self.waiting: dict[int, deque[asyncio.Future[None]]] = {}
        self._accounts: dict[tuple[Principal, str], tuple[Account, ...]] = {}

    def reserve(self, principal: Principal, request: ModelRequest, *, prompt_tokens: int, max_tokens: int) -> Held:
        """Hold what the request may cost; on exit what the engine did not compute is given back.

        Raises:
            RateLimitedError: On entering: a limit or a budget is spent, or the engine stays full.
        """
        num_choices = request.sampling.get("n") or 1
        return Held(self, principal, request.model, prompt_tokens, max_tokens * int(num_choices))

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
                ledger.account("model", model),
            ]
            known = tuple(account for account in found if account is not None)
            if len(self._accounts) >= 65536:
                self._accounts.clear()
            self._accounts[(principal, model)] = known
        return known

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


class Held:
    """What one request holds while it runs; implements `ports.Reservation`."""

    __slots__ = (
        "_completion_tokens",
        "_grant",
        "_has_begun",
        "_is_settled",
        "_limits",
        "_model",
        "_num_seen",
        "_principal",
        "_prompt_tokens",
        "_seen",
        "headers",
    )

    def __init__(
        self, limits: LimitedUse, principal: Principal, model: str, prompt_tokens: int, completion_tokens: int
    ) -> None:
        self._limits = limits
        self._principal = principal
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = completion_tokens
        self._grant: Grant | None = None
        self._is_settled = False
        self._has_begun = False
        self._num_seen = 0
        self._seen: Usage | None = None
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        limits = self._limits
        accounts = limits.accounts(self._principal, self._model)
        cost = limits.book.price(self._model).cost_micros(self._prompt_tokens, self._completion_tokens)
        num_tokens = self._prompt_tokens + self._completion_tokens
        taken = await limits.ledger.take(accounts, num_tokens, cost)
        if isinstance(taken, Shortage):
            taken = await self._wait(accounts, num_tokens, cost, taken)
        self._grant = taken
        self.headers = taken.headers
        engine = limits.engines.get(self._model)
        if engine is not None:
            try:
                await engine.acquire(self._principal.tenant, max_wait_s=limits.book.max_wait_s)
            except BaseException:
                limits.ledger.settle(taken, 0, 0)
                limits.wake(accounts)
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        limits, grant = self._limits, self._grant
        if grant is None:
            return
        if not self._is_settled:
            self._charge_seen()
        engine = limits.engines.get(self._model)
        if engine is not None:
            engine.release(self._principal.tenant)
        limits.wake(grant.accounts)

    async def watch(self, deltas: AsyncGenerator[list[Delta], None]) -> AsyncGenerator[list[Delta], None]:
        """Yield what the engine says and count it.

        A caller who leaves before the end, and an answer that the guard blocks, have cost what they have cost.
        """
        self._has_begun = True
        try:
            async with aclosing(deltas):
                async for batch in deltas:
                    self._num_seen += len(batch)  # the engine says a token at a time
                    last = batch[-1] if batch else None
                    if last is not None and last.usage is not None:
                        self._seen = last.usage
                    yield batch
        except UnavailableError:
            self._has_begun = self._num_seen > 0  # an engine that did not answer computed nothing
            raise

    def settle(self, outcome: Outcome) -> None:
        """Replace the reservation by what was really used, once."""
        self._settle(outcome.usage)

    def _charge_seen(self) -> None:
        if self._has_begun:
            self._settle(self._seen or Usage(self._prompt_tokens, self._num_seen))
        elif self._grant is not None:
            self._limits.ledger.settle(self._grant, 0, 0)

    def _settle(self, usage: Usage) -> None:
        if self._is_settled or self._grant is None:
            return
        self._is_settled = True
        limits = self._limits
        cost = limits.book.price(self._model).cost_micros(usage.prompt_tokens, usage.completion_tokens)
        limits.ledger.settle(self._grant, usage.prompt_tokens + usage.completion_tokens, cost)
        limits.usage.add(self._principal, self._model, usage.prompt_tokens, usage.completion_tokens, cost)

    async def _wait(self, accounts: tuple[Account, ...], num_tokens: int, cost: int, short: Shortage) -> Grant:
        """Wait for a shortage to pass, as long as the book allows: a client that is refused comes back thrice."""
        limits = self._limits
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + limits.book.max_wait_s
        while True:
            left_s = deadline_s - loop.time()
            if left_s <= 0 or short.wait_s > left_s:
                raise _refusal(short)
            if short.kind == "concurrent":
                await self._wait_for_place(accounts, left_s)
            else:
                await asyncio.sleep(short.wait_s)
            taken = await limits.ledger.take(accounts, num_tokens, cost)
            if not isinstance(taken, Shortage):
                return taken
            limits.wake(accounts)  # the place that woke us is of no use to us: let the next one try
            short = taken

    async def _wait_for_place(self, accounts: tuple[Account, ...], left_s: float) -> None:
        waiting = self._limits.waiting
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        poll_s = self._limits.ledger.poll_s
        full = [
            one
            for one in accounts
            if one.rule.concurrent is not None and (poll_s is not None or one.running >= one.rule.concurrent)
        ]
        for account in full:
            waiting.setdefault(id(account), deque()).append(place)
        try:
            await asyncio.wait([place], timeout=left_s if poll_s is None else min(left_s, poll_s))
        finally:
            for account in full:
                queue = waiting.get(id(account))
                if queue is not None and place in queue:
                    queue.remove(place)
                if not queue:
                    waiting.pop(id(account), None)


def _refusal(short: Shortage) -> RateLimitedError:
    words = _WORDS[short.kind]
    if math.isinf(short.wait_s):
        return RateLimitedError(
            f"This request alone is more than this {short.dimension}'s limit of {words}; ask for fewer tokens.",
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
