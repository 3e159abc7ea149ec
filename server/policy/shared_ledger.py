"""Counts in Redis what accounts use, for several replicas; the same rules as the counts in memory."""

from __future__ import annotations

import asyncio
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from redis.exceptions import RedisError

from server.errors import ConfigError, UnavailableError
from server.policy.rate import Account, Grant, Shortage, format_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from server.policy.limit_file import LimitBook, Rule

_SCRIPT = (Path(__file__).parent / "shared_ledger.lua").read_text(encoding="utf-8")
# A replica that dies leaves its streams counted for this long; one that lives renews them well before.
LEASE_S = 30.0
RENEW_S = 10.0
SETTLE_TRIES = 60
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
        self._accounts: dict[tuple[str, str], SharedAccount] = {}
        self._leases: dict[str, tuple[Account, ...]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    def account(self, dimension: str, name: str) -> Account | None:
        """Return the account of this name; None where no rule limits it."""
        found = self._accounts.get((dimension, name))
        if found is None:
            rule = self._book.rule(dimension, name)
            if rule is None:
                return None
            found = SharedAccount(dimension, rule, f"{PREFIX}{dimension}:{name}")
            self._accounts[(dimension, name)] = found
        return found

    async def seed(self, totals: Iterable[tuple[str, str, int, int, int]]) -> None:
        """Take over what the store says was used, where Redis knows nothing of an account (it was emptied, or is new).

        Args:
            totals: Dimension, name, tokens of today, cost of today, cost of this month.

        Raises:
            UnavailableError: Redis does not answer.
        """
        for dimension, name, tokens_day, cost_day, cost_month in totals:
            account = self.account(dimension, name)
            if account is not None:
                await self._run([account], "seed", tokens_day, cost_day, cost_month)

    async def take(self, accounts: tuple[Account, ...], num_tokens: int, cost_micros: int) -> Grant | Shortage:
        """Take what a request may use from every account, or nothing.

        Raises:
            UnavailableError: Redis does not answer; nothing runs uncounted.
        """
        lease = secrets.token_hex(8)
        limits = [-1 if limit is None else limit for account in accounts for limit in _limits(account.rule)]
        answer = await self._run(accounts, "take", num_tokens, cost_micros, lease, LEASE_S, *limits)
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
                for start in range(0, len(held), 500):
                    part = held[start : start + 500]
                    await self._run([account for account, _ in part], "renew", LEASE_S, *[lease for _, lease in part])
            except UnavailableError:
                continue  # tried again in time, or the places come free early

    async def _run(self, accounts: Iterable[Account], verb: str, *arguments: float | str) -> list[str]:
        now_s = -1.0 if self._clock is None else self._clock()
        keys = [account.key for account in accounts if isinstance(account, SharedAccount)]
        try:
            answer = await self._script(keys=keys, args=[verb, repr(now_s), *arguments])
        except (RedisError, OSError) as error:
            raise UnavailableError(
                f"The limits can't be counted: Redis does not answer ({type(error).__name__})."
            ) from error
        return answer if isinstance(answer, list) else [str(answer)]


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
