"""Shares an engine's places between tenants when it is full."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from server.errors import RateLimitedError


class Fairness:
    """Admits at most `capacity` requests to one engine, tenants in turn.

    No tenant takes the last `reserved` places while it holds the others, so one that comes new finds a place at once
    however many requests another has sent. A free place goes to the waiting tenant that runs the fewest; among equals
    to the one served longest ago.

    Args:
        capacity: Places in the engine.
        reserved: Places that no single tenant takes beyond the others; by default a quarter.
        max_waiting: Requests of one tenant that may wait.
    """

    def __init__(self, capacity: int, *, reserved: int | None = None, max_waiting: int = 256) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self._capacity = capacity
        self._share = max(1, capacity - (max(1, capacity // 4) if reserved is None else reserved))
        self._max_waiting = max_waiting
        self._total = 0
        self._running: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def num_running(self) -> int:
        """Places taken."""
        return self._total

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in self._waiting.values())

    async def acquire(self, tenant: str, *, max_wait_s: float) -> None:
        """Take a place, waiting for one at most `max_wait_s`.

        Raises:
            RateLimitedError: None came free in time, or too many requests of this tenant wait already.
        """
        if tenant not in self._waiting and self._may_start(tenant):
            self._start(tenant)
            return
        queue = self._waiting.setdefault(tenant, deque())
        if len(queue) >= self._max_waiting or max_wait_s <= 0:
            self._forget_if_empty(tenant)
            raise _full()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(place)
        try:
            async with asyncio.timeout(max_wait_s):
                await place
        except (TimeoutError, asyncio.CancelledError) as error:
            if place.done() and not place.cancelled():  # it was given in the same moment: pass it on
                self.release(tenant)
            else:
                place.cancel()
                if place in queue:
                    queue.remove(place)
                self._forget_if_empty(tenant)
            if isinstance(error, TimeoutError):
                raise _full() from None
            raise

    def release(self, tenant: str) -> None:
        """Give a place back."""
        self._total -= 1
        left = self._running[tenant] - 1
        if left:
            self._running[tenant] = left
        else:
            del self._running[tenant]
        while self._total < self._capacity:
            following = self._next()
            if following is None:
                return
            place = self._waiting[following].popleft()
            self._waiting.move_to_end(following)
            self._forget_if_empty(following)
            if not place.done():
                self._start(following)
                place.set_result(None)

    def _next(self) -> str | None:
        able = [tenant for tenant in self._waiting if self._may_start(tenant)]
        return min(able, key=lambda tenant: self._running.get(tenant, 0)) if able else None

    def _may_start(self, tenant: str) -> bool:
        return self._total < self._capacity and self._running.get(tenant, 0) < self._share

    def _start(self, tenant: str) -> None:
        self._total += 1
        self._running[tenant] = self._running.get(tenant, 0) + 1

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._waiting.get(tenant):
            self._waiting.pop(tenant, None)


def _full() -> RateLimitedError:
    return RateLimitedError(
        "The engine is full and no place came free in time; try again in a moment.", retry_after_s=2, code="engine_full"
    )
