"""Puts changed policy files in force while the server runs, on record first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from server.errors import AuditUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from server.policy.engine import PolicyEngine

FOLLOW_S = 2.0


async def follow_policies(
    policy: PolicyEngine, record: Callable[..., Awaitable[Any]], *, interval_s: float = FOLLOW_S
) -> None:
    """Look for changed files until cancelled.

    A bad set is put on record once and the old one stays in force. A good one is in force once its record is durable;
    while the log can't be written, the change waits.

    Args:
        policy: Whose folder to follow.
        record: Puts an act on the audit log, durable on return.
        interval_s: Seconds between looks.
    """
    known = policy.stamp()
    while True:
        await asyncio.sleep(interval_s)
        stamp = policy.stamp()
        if stamp == known:
            continue
        before = policy.policies.digest
        try:
            try:
                fresh = await asyncio.to_thread(policy.read_next)
            except ConfigError as error:
                await record("admin:policy:changed", by="files", refused=True, reason=str(error)[:500], before=before)
            else:
                if fresh.digest != before:
                    await record("admin:policy:changed", by="files", before=before, after=fresh.digest)
                    policy.adopt(fresh)
        except AuditUnavailableError:
            continue  # not on record, so not in force; the next look tries again
        known = stamp
