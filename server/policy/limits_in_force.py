"""Keeps the limits file in force while the server runs; the old rules stay when the new ones are bad."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from server.policy.budget import sum_used
from server.policy.limit_file import load_limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.policy.budget import LimitedUse
    from server.policy.limit_file import LimitBook
    from server.store.database import Store


class LimitsInForce:
    """What `follow` keeps in step with `limits.yaml`.

    Args:
        limits: Where the rules are put in force.
        path: The file.
        store: What was used before, for accounts that a new rule begins to count.
        clock: Seconds since the epoch.
    """

    def __init__(self, limits: LimitedUse, path: Path, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._limits = limits
        self._path = path
        self._store = store
        self._clock = clock

    @property
    def current(self) -> LimitBook:
        """The rules in force."""
        return self._limits.book

    def stamp(self) -> tuple[int, int, int] | None:
        """Return what differs when the file was changed; None while it is gone."""
        try:
            info = self._path.stat()
        except OSError:
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size

    def read_next(self) -> LimitBook:
        """Return the rules that the file holds now.

        Raises:
            ConfigError: They are wrong, or the file is gone.
        """
        return load_limits(self._path)

    async def adopt(self, fresh: LimitBook) -> None:
        """Put rules in force, over what was used today and this month by everybody.

        Raises:
            UnavailableError: The store or the counts can't be reached; the old rules stay.
        """
        totals = await asyncio.to_thread(self._sum)
        await self._limits.adopt(fresh, totals)

    def _sum(self) -> list[tuple[str, str, int, int, int]]:
        self._limits.usage.flush(self._store)
        return list(sum_used(self._store, self._clock()))
