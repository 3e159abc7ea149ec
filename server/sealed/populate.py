"""New memory is made present by threads that have nothing else to do, before what is decrypted arrives there.

The pages of a parameter that nobody has written to cost more than to decrypt into it: the kernel clears each when it
is first touched. A plain copy touches them with all of torch's threads at once; a small tensor is decrypted by one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from server.sealed.memory import HUGE_PAGE_BYTES, advise_huge_pages, populate, whole_pages

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future, ThreadPoolExecutor

_STEP_BYTES: Final = 8 << 20
# Clearing a large page takes a tenth of it. A virtual machine that gave its free memory back to its host waits for each
# page of it again, and has small ones that it did not give back.
_SLOW_S_A_PAGE: Final = 1e-3
# More than such a machine has of small ones. And then most tensors are large: all threads decrypt each of them, and
# touch its pages as they go.
_MUCH_BYTES: Final = 1 << 30


class Populated:
    """Makes ranges of memory present, the largest and the last first, each from its end: who fills it begins in front.

    What is there already is left alone, whatever it holds, so it does not matter who comes first. Where the kernel does
    not know how (before 5.14) or has no large pages, nothing is different but the time. Of much memory nothing is made
    present: large pages are asked for, and that is all.

    Args:
        ranges: (address, bytes) of each; must stay allocated until `close`.
        pool: Whose threads do it; None for none.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]], pool: ThreadPoolExecutor | None) -> None:
        self._ranges = [(address, num_bytes) for address, num_bytes in ranges if num_bytes]
        self._is_closed = False
        self._futures: list[Future[None]] = []
        is_much = sum(num_bytes for _, num_bytes in self._ranges) >= _MUCH_BYTES
        self._are_large = is_much or self._try_large_page()
        if self._are_large:
            for address, num_bytes in self._ranges:
                advise_huge_pages(address, num_bytes)
        if pool is not None and not is_much:
            # The largest first: it keeps who fills it busy the longest.
            by_size = sorted(enumerate(self._ranges), key=lambda one: (one[1][1], one[0]), reverse=True)
            for _, (address, num_bytes) in by_size:
                for offset in reversed(range(0, num_bytes, _STEP_BYTES)):
                    step = min(_STEP_BYTES, num_bytes - offset)
                    self._futures.append(pool.submit(self._step, address + offset, step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Begin no more."""
        self._is_closed = True
        for future in self._futures:
            if not future.cancel():
                future.result()

    def _step(self, address: int, num_bytes: int) -> None:
        if self._is_closed:
            return
        before = time.perf_counter()
        populate(address, num_bytes)
        took = time.perf_counter() - before
        if self._are_large and took > num_bytes / HUGE_PAGE_BYTES * _SLOW_S_A_PAGE:
            self._are_large = False
            for first, length in self._ranges:
                advise_huge_pages(first, length, wanted=False)

    def _try_large_page(self) -> bool:
        address, num_bytes = max(self._ranges, key=lambda r: r[1], default=(0, 0))
        first, end = whole_pages(address, num_bytes, HUGE_PAGE_BYTES)
        if first >= end:
            return False
        advise_huge_pages(first, HUGE_PAGE_BYTES)
        before = time.perf_counter()
        populate(first, HUGE_PAGE_BYTES)
        return time.perf_counter() - before < _SLOW_S_A_PAGE
