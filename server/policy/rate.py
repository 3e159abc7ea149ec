"""Counts in memory what accounts use, in sliding and fixed windows; takes all that a request needs, or nothing."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from server.policy.limit_file import Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from server.policy.limit_file import LimitBook

MINUTE_S = 60.0
DAY_S = 86400
MAX_BACK_S = 60.0


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a request can't run now. `wait_s` is infinite where no waiting helps."""

    dimension: str
    kind: str
    wait_s: float


class Window:
    """A sliding window of a minute: the count of this minute, and of the last in proportion to what is left of it."""

    __slots__ = ("current", "index", "previous")

    def __init__(self) -> None:
        self.index = -1
        self.current = 0
        self.previous = 0

    def used(self, now_s: float) -> float:
        """Return what counts now."""
        index = int(now_s // MINUTE_S)
        if index != self.index:
            self.previous = self.current if index == self.index + 1 else 0
            self.current = 0
            self.index = index
        if not self.previous:
            return self.current
        return self.previous * (1.0 - (now_s - index * MINUTE_S) / MINUTE_S) + self.current

    def adjust(self, change: int, index: int) -> None:
        """Correct the count of the minute `index`, if it still counts."""
        if index == self.index:
            self.current = max(0, self.current + change)
        elif index == self.index - 1:
            self.previous = max(0, self.previous + change)

    def wait_s(self, num: int, limit: int, now_s: float) -> float:
        """Return the seconds until `num` more fit under `limit`, if nothing else comes; infinite if they never do."""
        if num > limit:
            return math.inf
        if self.used(now_s) + num <= limit:
            return 0.0
        part = (now_s - self.index * MINUTE_S) / MINUTE_S
        if self.current + num <= limit:
            return max(0.001, (1.0 - (limit - num - self.current) / self.previous - part) * MINUTE_S)
        return max(0.001, (2.0 - (limit - num) / self.current - part) * MINUTE_S)


class Account:
    """What one key, subject, team, tenant or model uses."""

    __slots__ = (
        "cost_day",
        "cost_month",
        "day",
        "dimension",
        "month",
        "requests",
        "rule",
        "running",
        "tokens",
        "tokens_day",
    )

    def __init__(self, dimension: str, rule: Rule) -> None:
        self.dimension = dimension
        self.rule = rule
        self.requests = Window()
        self.tokens = Window()
        self.running = 0
        self.day = -1
        self.tokens_day = 0
        self.cost_day = 0
        self.month = -1
        self.cost_month = 0


AnyAccount = TypeVar("AnyAccount", bound=Account)


@dataclass(slots=True)
class Grant:
    """What a request holds: settled once."""

    accounts: tuple[Account, ...]
    num_tokens: int
    cost_micros: int
    minute: int
    day: int
    month: int
    headers: dict[str, str]
    lease: str = ""


def _until(ends_s: float, num: int, limit: int) -> float:
    """Return how long to wait for a budget's next period; for ever where not even a whole one holds `num`."""
    return math.inf if num > limit else ends_s


class MemoryLedger:
    """The accounts of one process.

    There is an account for every principal that was seen and has a rule: principals are authenticated, so their number
    is the operator's doing.

    Args:
        book: The rules.
        clock: Seconds since the epoch.
    """

    poll_s: float | None = None

    def __init__(self, book: LimitBook, *, clock: Callable[[], float] = time.time) -> None:
        self._book = book
        self._clock = clock
        self._accounts: dict[tuple[str, str], Account] = {}
        self._latest_s = 0.0
        self._day = -1
        self._month = -1
        self._month_ends_s = 0.0

    def account(self, dimension: str, name: str) -> Account | None:
        """Return the account of this name; None where no rule limits it."""
        found = self._accounts.get((dimension, name))
        if found is None:
            rule = self._book.rule(dimension, name)
            if rule is None:
                return None
            found = self._accounts[(dimension, name)] = Account(dimension, rule)
        return found

    async def adopt(self, book: LimitBook, totals: Iterable[tuple[str, str, int, int, int]]) -> None:
        """Put rules in force. Accounts keep what they have counted, and count no less than the store says.

        Args:
            book: The rules.
            totals: Dimension, name, tokens of today, cost of today, cost of this month.
        """
        self._book = book
        change_rules(self._accounts, book)
        day, month = self._calendar(self._now_s())
        for dimension, name, tokens_day, cost_day, cost_month in totals:
            account = self.account(dimension, name)
            if account is not None:
                _move_on(account, day, month)
                account.tokens_day = max(account.tokens_day, tokens_day)
                account.cost_day = max(account.cost_day, cost_day)
                account.cost_month = max(account.cost_month, cost_month)

    async def take(
        self,
        accounts: tuple[Account, ...],
        num_tokens: int,
        cost_micros: int,
        num_requests: int = 1,
        instead: Grant | None = None,
    ) -> Grant | Shortage:
        """Take what a request may use from every account, or nothing."""
        now_s = self._now_s()
        day, month = self._calendar(now_s)
        worst: Shortage | None = None
        for account in accounts:
            _move_on(account, day, month)
            num_running = account.running - (instead is not None and account in instead.accounts)
            short = self._check(account, num_tokens, cost_micros, num_requests, num_running, now_s)
            if short is not None and (worst is None or short.wait_s > worst.wait_s):
                worst = short
        if worst is not None:
            return worst
        minute = int(now_s // MINUTE_S)
        for account in accounts:
            account.requests.current += num_requests
            account.tokens.current += num_tokens
            account.running += 1
            account.tokens_day += num_tokens
            account.cost_day += cost_micros
            account.cost_month += cost_micros
        requests = [account.requests.used(now_s) for account in accounts]
        tokens = [account.tokens.used(now_s) for account in accounts]
        headers = format_headers(accounts, requests, tokens, now_s)
        return Grant(accounts, num_tokens, cost_micros, minute, day, month, headers)

    def settle(self, grant: Grant, num_tokens: int, cost_micros: int) -> None:
        """Replace what was taken by what was used. The request itself stays counted."""
        tokens, cost = num_tokens - grant.num_tokens, cost_micros - grant.cost_micros
        for account in grant.accounts:
            account.running -= 1
            account.tokens.adjust(tokens, grant.minute)
            if account.day == grant.day:
                account.tokens_day += tokens
                account.cost_day += cost
            if account.month == grant.month:
                account.cost_month += cost

    def _check(
        self, account: Account, num_tokens: int, cost_micros: int, num_requests: int, num_running: int, now_s: float
    ) -> Shortage | None:
        rule = account.rule
        requests, tokens = account.requests.used(now_s), account.tokens.used(now_s)
        dimension = account.dimension
        tomorrow_s = DAY_S - now_s % DAY_S
        if rule.requests_per_minute is not None and requests + num_requests > rule.requests_per_minute:
            wait_s = account.requests.wait_s(num_requests, rule.requests_per_minute, now_s)
            return Shortage(dimension, "requests", wait_s)
        if rule.tokens_per_minute is not None and tokens + num_tokens > rule.tokens_per_minute:
            return Shortage(dimension, "tokens", account.tokens.wait_s(num_tokens, rule.tokens_per_minute, now_s))
        if rule.tokens_per_day is not None and account.tokens_day + num_tokens > rule.tokens_per_day:
            return Shortage(dimension, "tokens_day", _until(tomorrow_s, num_tokens, rule.tokens_per_day))
        if rule.cost_micros_per_day is not None and account.cost_day + cost_micros > rule.cost_micros_per_day:
            return Shortage(dimension, "cost_day", _until(tomorrow_s, cost_micros, rule.cost_micros_per_day))
        if rule.cost_micros_per_month is not None and account.cost_month + cost_micros > rule.cost_micros_per_month:
            wait_s = _until(self._month_ends_s - now_s, cost_micros, rule.cost_micros_per_month)
            return Shortage(dimension, "cost_month", wait_s)
        if rule.concurrent is not None and num_running >= rule.concurrent:
            return Shortage(dimension, "concurrent", 0.0)
        return None

    def _now_s(self) -> float:
        """Return the time; a clock that is set back by a moment must not open the last minute, day or month anew."""
        now_s = self._clock()
        if not 0 < self._latest_s - now_s <= MAX_BACK_S:
            self._latest_s = now_s
        return self._latest_s

    def _calendar(self, now_s: float) -> tuple[int, int]:
        day = int(now_s // DAY_S)
        if day != self._day:
            today = datetime.fromtimestamp(now_s, tz=UTC)
            following = datetime(today.year + today.month // 12, today.month % 12 + 1, 1, tzinfo=UTC)
            self._month_ends_s = following.timestamp()
            self._day, self._month = day, today.year * 12 + today.month
        return self._day, self._month


def _move_on(account: Account, day: int, month: int) -> None:
    if account.day != day:
        account.day, account.tokens_day, account.cost_day = day, 0, 0
    if account.month != month:
        account.month, account.cost_month = month, 0


def change_rules(accounts: dict[tuple[str, str], AnyAccount], book: LimitBook) -> None:
    """Give each account its rule of `book`; one that has none there is forgotten, and lets in whoever waits for it."""
    for (dimension, name), account in list(accounts.items()):
        rule = book.rule(dimension, name)
        account.rule = rule or Rule()
        if rule is None:
            del accounts[(dimension, name)]


def format_headers(
    accounts: tuple[Account, ...], requests: Sequence[float], tokens: Sequence[float], now_s: float
) -> dict[str, str]:
    """Return the headers clients read, of the account that is nearest its limit, requests and tokens apart.

    Args:
        accounts: What a request counts against.
        requests: What each has used of its requests a minute.
        tokens: What each has used of its tokens a minute.
        now_s: Seconds since the epoch.
    """
    headers: dict[str, str] = {}
    least_requests = least_tokens = math.inf
    limit_requests = limit_tokens = 0
    for position, account in enumerate(accounts):
        rule = account.rule
        if rule.requests_per_minute is not None and rule.requests_per_minute - requests[position] < least_requests:
            limit_requests = rule.requests_per_minute
            least_requests = limit_requests - requests[position]
        if rule.tokens_per_minute is not None and rule.tokens_per_minute - tokens[position] < least_tokens:
            limit_tokens = rule.tokens_per_minute
            least_tokens = limit_tokens - tokens[position]
    # All that counts now has left the sliding window when two minutes are over, at the latest.
    reset = f"{120 - int(now_s % MINUTE_S)}s"
    if limit_requests:
        headers["x-ratelimit-limit-requests"] = str(limit_requests)
        headers["x-ratelimit-remaining-requests"] = str(max(0, int(least_requests)))
        headers["x-ratelimit-reset-requests"] = reset
    if limit_tokens:
        headers["x-ratelimit-limit-tokens"] = str(limit_tokens)
        headers["x-ratelimit-remaining-tokens"] = str(max(0, int(least_tokens)))
        headers["x-ratelimit-reset-tokens"] = reset
    return headers
