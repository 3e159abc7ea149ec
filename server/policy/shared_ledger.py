"""Counts in Redis what accounts use, for several replicas; the same rules as the counts in memory."""

from __future__ import annotations

import asyncio
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.errors import ConfigError, UnavailableError
from server.policy.rate import Account, Grant, Shortage, change_rules, format_headers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from server.policy.limit_file import LimitBook, Rule

_SCRIPT = (Path(__file__).parent / "shared_ledger.lua").read_text(encoding="utf-8")
# A replica that dies leaves its streams counted for this long; one that lives renews them well before.
LEASE_S = 30.0
RENEW_S = 10.0
SETTLE_TRIES = 60
BATCH = 500
PREFIX = "strongroom:limits:"


class SharedAccount(Account):
    """An account whose counts are in Redis."""

    __slots__ = ("key",)

    def __init__(self, dimension: str, rule: Rule, key: str) -> None:
        super().__init__(dimension, rule)
        self.key = key


class SharedLedger:
    """The accounts of all replicas, in one Redis (not a cluster: a request touches several keys at once).

    What a request may use is counted before it runs, in one atomic step over all its accounts, so fifty writers on two
    replicas never spend more than a budget. A replica that is killed leaves what it held counted as spent: nobody knows
    how much of it was used, and a budget is never given back on a guess. Its places among running streams come free
    after `LEASE_S`.

    Args:
        url: `redis://`, `rediss://` or `unix://` with a path.
        book: The rules.
        clock: Seconds since the epoch; None for Redis' own, which all replicas share.

    Attributes:
        refill: Calls `adopt` with the store's totals; awaited when Redis turns out to have been emptied.

    Raises:
        ConfigError: The address is none.
    """

    # How often to look for a place that another replica may have freed.
    poll_s: float | None = 0.1

    def __init__(self, url: str, book: LimitBook, *, clock: Callable[[], float] | None = None) -> None:
        try:
            self._redis = Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0, decode_responses=True)
        except ValueError as error:
            raise ConfigError("The address of Redis must begin with redis://, rediss:// or unix://.") from error
        self._script = self._redis.register_script(_SCRIPT)
        self._book = book
        self._clock = clock
        self.refill: Callable[[], Awaitable[None]] = lambda: self.adopt(self._book, ())
        self._epoch = ""
        self._refilling = asyncio.Lock()
        self._accounts: dict[tuple[str, str], SharedAccount] = {}
        self._leases: dict[str, tuple[Account, ...]] = {}
        self._taking: set[asyncio.Task[Grant | Shortage]] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    def account(self, dimension: str, name: str) -> Account | None:
        """Return the account of this name; None where no rule limits it."""
        found = self._accounts.get((dimension, name))
        if found is None:
            rule = self._book.rule(dimension, name)
            if rule is None:
                return None
            found = self._accounts[(dimension, name)] = _new_account(dimension, name, rule)
        return found

    async def adopt(self, book: LimitBook, totals: Iterable[tuple[str, str, int, int, int]]) -> None:
        """Put rules in force; accounts then count no less than the store says (Redis was emptied, or a rule is new).

        Args:
            book: The rules.
            totals: Dimension, name, tokens of today, cost of today, cost of this month.

        Raises:
            UnavailableError: Redis does not answer; the old rules stay.
        """
        epoch = (await self._run([], "epoch", secrets.token_hex(8)))[0]
        known = [
            (_new_account(dimension, name, rule), used)
            for dimension, name, *used in totals
            if (rule := book.rule(dimension, name)) is not None
        ]
        for start in range(0, len(known), BATCH):
            part = known[start : start + BATCH]
            await self._run([account for account, _ in part], "seed", *[one for _, used in part for one in used])
        self._epoch = epoch
        self._book = book
        change_rules(self._accounts, book)

    async def take(
        self,
        accounts: tuple[Account, ...],
        num_tokens: int,
        cost_micros: int,
        num_requests: int = 1,
        instead: Grant | None = None,
    ) -> Grant | Shortage:
        """Take what a request may use from every account, or nothing.

        Raises:
            UnavailableError: Redis does not answer; nothing runs uncounted.
        """
        taking = asyncio.get_running_loop().create_task(
            self._take(accounts, num_tokens, cost_micros, num_requests, instead)
        )
        self._taking.add(taking)
        taking.add_done_callback(self._taking.discard)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # who leaves at this moment must not leave others' budgets taken
            taking.add_done_callback(self._give_back)
            raise

    def _give_back(self, taking: asyncio.Task[Grant | Shortage]) -> None:
        if not taking.cancelled() and taking.exception() is None and isinstance(taken := taking.result(), Grant):
            self.settle(taken, 0, 0)

    async def _take(
        self, accounts: tuple[Account, ...], num_tokens: int, cost_micros: int, num_requests: int, instead: Grant | None
    ) -> Grant | Shortage:
        lease = secrets.token_hex(8)
        limits = [-1 if limit is None else limit for account in accounts for limit in _limits(account.rule)]
        wanted = (num_tokens, cost_micros, lease, LEASE_S, num_requests, "" if instead is None else instead.lease)
        epoch = self._epoch
        answer = await self._run(accounts, "take", *wanted, epoch, *limits)
        if answer[0] == -1:
            async with self._refilling:
                if self._epoch == epoch:  # else another request saw to it
                    await self.refill()
            answer = await self._run(accounts, "take", *wanted, self._epoch, *limits)
        if answer[0] == -1:
            raise UnavailableError("The limits can't be counted: Redis was emptied, and again while it was filled.")
        if not answer[0]:
            wait_s = float(answer[3])
            return Shortage(accounts[int(answer[1]) - 1].dimension, answer[2], math.inf if wait_s < 0 else wait_s)
        used = [float(one) for one in answer[4:-1]]
        headers = format_headers(accounts, used[0::2], used[1::2], float(answer[-1]))
        self._leases[lease] = accounts
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._renew())
        return Grant(accounts, num_tokens, cost_micros, int(answer[1]), int(answer[2]), int(answer[3]), headers, lease)

    def settle(self, grant: Grant, num_tokens: int, cost_micros: int) -> None:
        """Replace what was taken by what was used, behind the answer that is being sent."""
        self._leases.pop(grant.lease, None)
        task = asyncio.get_running_loop().create_task(self._settle(grant, num_tokens, cost_micros))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def wait_settled(self) -> None:
        """Wait until what was settled has arrived, at most five seconds."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=5)

    async def close(self) -> None:
        """Finish what is being settled and let go of Redis."""
        await self.wait_settled()
        if self._renewing is not None:
            self._renewing.cancel()
        await self._redis.aclose()

    async def _settle(self, grant: Grant, num_tokens: int, cost_micros: int) -> None:
        for _ in range(SETTLE_TRIES):
            try:
                await self._run(
                    grant.accounts,
                    "settle",
                    num_tokens - grant.num_tokens,
                    cost_micros - grant.cost_micros,
                    grant.lease,
                    grant.minute,
                    grant.day,
                    grant.month,
                )
            except UnavailableError:
                await asyncio.sleep(1)
            else:
                return
        # Given up: the reservation stays counted in full, which is never less than what was used.

    async def _renew(self) -> None:
        """Renew the leases of what runs here, until nothing does."""
        while self._leases:
            await asyncio.sleep(RENEW_S)
            held = [(account, lease) for lease, accounts in self._leases.items() for account in accounts]
            try:
                for start in range(0, len(held), BATCH):
                    part = held[start : start + BATCH]
                    await self._run([account for account, _ in part], "renew", LEASE_S, *[lease for _, lease in part])
            except UnavailableError:
                continue  # tried again in time, or the places come free early

    async def _run(self, accounts: Iterable[Account], verb: str, *arguments: float | str) -> list[Any]:
        now_s = -1.0 if self._clock is None else self._clock()
        keys = [account.key for account in accounts if isinstance(account, SharedAccount)]
        try:
            answer = await self._script(keys=keys, args=[verb, repr(now_s), *arguments])
        except (RedisError, OSError) as error:
            raise UnavailableError(
                f"The limits can't be counted: Redis does not answer ({type(error).__name__})."
            ) from error
        return answer if isinstance(answer, list) else [str(answer)]


def _new_account(dimension: str, name: str, rule: Rule) -> SharedAccount:
    return SharedAccount(dimension, rule, f"{PREFIX}{dimension}:{name}")


def _limits(rule: Rule) -> tuple[int | None, ...]:
    """Return the limits of a rule in the order in which the script reads them."""
    return (
        rule.requests_per_minute,
        rule.tokens_per_minute,
        rule.concurrent,
        rule.tokens_per_day,
        rule.cost_micros_per_day,
        rule.cost_micros_per_month,
    )
