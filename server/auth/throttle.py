"""Counts failed authentications by address; the memory for it is bounded."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from server.errors import AuditUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

MAX_ADDRESSES = 65536
MAX_REPORTED = 1024
OTHERS = "others"
REPORT_S = 30.0


class FailureThrottle:
    """A bucket of failures for each address: it holds `burst` and regains one every `refill_s` seconds.

    An IPv6 caller has at least a /64 to itself, so such addresses are counted by /64. When `MAX_ADDRESSES` are known,
    the one that failed longest ago is forgotten.

    Args:
        burst: Failures that an address has free.
        refill_s: Seconds after which one failure is forgiven.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, *, burst: int = 60, refill_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = float(burst)
        self._refill_s = refill_s
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._suppressed: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, address: str) -> float:
        """Return the seconds until this address may fail again; 0 if it may now."""
        if not self._buckets:
            return 0.0
        found = self._buckets.get(_network(address))
        if found is None:
            return 0.0
        left = self._left(found)
        return 0.0 if left >= 1.0 else (1.0 - left) * self._refill_s

    def fail(self, address: str) -> None:
        """Count one failure."""
        network = _network(address)
        found = self._buckets.pop(network, None)
        left = self._burst if found is None else self._left(found)
        if left < 1.0:
            named = network if network in self._suppressed or len(self._suppressed) < MAX_REPORTED else OTHERS
            self._suppressed[named] = self._suppressed.get(named, 0) + 1
        self._buckets[network] = (max(0.0, left - 1.0), self._clock())
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)

    def suppressed(self) -> dict[str, int]:
        """Return how many failures came after an address was told to wait, by address, that are not reported yet.

        Addresses beyond `MAX_REPORTED` are counted together, as `OTHERS`.
        """
        return dict(self._suppressed)

    def reported(self, named: str, num_failures: int) -> None:
        """Take what is on record from what `suppressed` returns."""
        left = self._suppressed.pop(named, 0) - num_failures
        if left > 0:
            self._suppressed[named] = left

    def _left(self, bucket: tuple[float, float]) -> float:
        left, at_s = bucket
        return min(self._burst, left + (self._clock() - at_s) / self._refill_s)


def keyless_throttle() -> FailureThrottle:
    """Return the one for callers without a credential: a client that was set up wrongly tries for a while."""
    return FailureThrottle(burst=600)


async def report_suppressed(
    throttles: Mapping[str, FailureThrottle], record: Callable[..., Awaitable[Any]], *, interval_s: float = REPORT_S
) -> None:
    """Put what was throttled on the audit log in sums, one entry a reason, address and interval, until cancelled.

    One entry each would let whoever sends them fill the log.
    """
    while True:
        await asyncio.sleep(interval_s)
        for reason, throttle in throttles.items():
            for network, num in throttle.suppressed().items():
                try:
                    await record("gateway:credential:refused", reason=reason, address=network, num_failures=num)
                except AuditUnavailableError:
                    break  # the log is down, and nothing else is answered either; it gets this sum later
                throttle.reported(network, num)


def _network(address: str) -> str:
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
