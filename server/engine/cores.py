"""Divides the machine's cores between the engines that compute on them: two that share one starve each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(topology: Path = _TOPOLOGY) -> tuple[tuple[int, ...], ...]:
    """Return the cores this process may use, each as the numbers of its threads."""
    allowed = os.sched_getaffinity(0)
    cores: dict[tuple[int, ...], None] = {}
    for number in sorted(allowed):
        try:
            listed = (topology / f"cpu{number}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
            threads = parse_cores(listed.strip())
        except (OSError, ValueError):
            threads = (number,)
        cores[tuple(thread for thread in threads if thread in allowed) or (number,)] = None
    return tuple(cores)


def parse_cores(text: str) -> tuple[int, ...]:
    """Return core numbers from `0-3,8`.

    Raises:
        ValueError: It is something else.
    """
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return tuple(cores)


def divide_cores(
    small: Sequence[bool], cores: Sequence[tuple[int, ...]], taken: Collection[int] = ()
) -> list[tuple[int, ...]]:
    """Return the threads that each engine is bound to, none shared; all empty where one engine has the machine.

    Args:
        small: For each engine whether an eighth of the cores will do (an embedding model); the others share the rest.
        cores: The machine's cores, each as the numbers of its threads. An engine gets one thread a core: two threads of
            a core compute no faster than one. Where there are fewer cores than engines, threads are dealt out.
        taken: Threads that other engines were given by hand.

    Raises:
        ValueError: There are fewer threads than engines.
    """
    if len(small) == 1 and not taken:
        return [()]
    single = [core[0] for core in cores if not any(thread in taken for thread in core)]
    if len(single) < len(small):
        single = [thread for core in cores for thread in core if thread not in taken]
    if len(single) < len(small):
        raise ValueError(f"{len(small)} engines need as many cores; {len(single)} are free")
    num_small = sum(small)
    num_large = len(small) - num_small
    eighth = max(1, len(single) // 8) if num_large else len(single) // max(1, num_small)
    eighth = min(eighth, (len(single) - num_large) // max(1, num_small))
    shares: list[tuple[int, ...]] = []
    start, left_large = 0, num_large
    left = len(single) - eighth * num_small
    for is_small in small:
        size = eighth
        if not is_small:
            size = left // left_large
            left -= size
            left_large -= 1
        shares.append(tuple(single[start : start + size]))
        start += size
    return shares
