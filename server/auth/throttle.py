"""Counts failed authentications by address; the memory for it is bounded."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ADDRESSES = 65536


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
        self._buckets[network] = (max(0.0, left - 1.0), self._clock())
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)

    def _left(self, bucket: tuple[float, float]) -> float:
        left, at_s = bucket
        return min(self._burst, left + (self._clock() - at_s) / self._refill_s)


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
