"""Puts changed files in force while the server runs, on record first: policies, templates and limits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from server.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

FOLLOW_S = 2.0


class FileSet(Protocol):
    """A set that was read from files whole. `digest` is what the audit log calls it."""

    @property
    def digest(self) -> str:
        """Lowercase hex."""
        ...


Set_ = TypeVar("Set_", bound=FileSet)


class Followed(Protocol[Set_]):
    """What keeps a set in force and can read the next one from its files."""

    @property
    def current(self) -> Set_:
        """The set in force."""
        ...

    def stamp(self) -> Hashable:
        """Return what differs when a file was changed."""
        ...

    def read_next(self) -> Set_:
        """Return the set that the files hold now, without putting it in force.

        Raises:
            ConfigError: It is wrong.
        """
        ...

    def adopt(self, fresh: Set_, /) -> Awaitable[None] | None:
        """Put a set in force; what is returned is waited for.

        Raises:
            UnavailableError: Not now; the old set stays.
        """
        ...


async def follow(
    followed: Followed[Set_], event: str, record: Callable[..., Awaitable[Any]], *, interval_s: float = FOLLOW_S
) -> None:
    """Look for changed files until cancelled.

    A refused set is put on record once and the old one stays in force. A good one is in force once its record is
    durable; while the log can't be written, the change waits.

    Args:
        followed: What to keep in step.
        event: The tag of the change on the audit log.
        record: Puts an act on the audit log, durable on return.
        interval_s: Seconds between looks.
    """
    known = followed.stamp()
    while True:
        await asyncio.sleep(interval_s)
        stamp = followed.stamp()
        if stamp == known:
            continue
        before = followed.current.digest
        try:
            try:
                fresh = await asyncio.to_thread(followed.read_next)
            except ConfigError as error:
                await record(event, by="files", refused=True, reason=str(error)[:500], before=before)
            else:
                if fresh.digest != before:
                    await record(event, by="files", before=before, after=fresh.digest)
                    adopting = followed.adopt(fresh)
                    if adopting is not None:
                        await adopting
        except UnavailableError:
            continue  # not on record or not to be had, so not in force; the next look tries again
        known = stamp
