"""Keeps the templates in step with their files while the gateway runs; every change is on the audit log."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from server.errors import AuditUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from server.template.registry import TemplateRegistry

FOLLOW_S = 2.0


async def follow_templates(
    registry: TemplateRegistry, record: Callable[..., Awaitable[Any]], *, interval_s: float = FOLLOW_S
) -> None:
    """Look for a changed lock or roll-out file until cancelled.

    A refused set is put on record once and the old one stays. A good one is in force once its record is durable;
    while the log can't be written, the change waits.

    Args:
        registry: What to keep in step.
        record: Puts an act on the audit log, durable on return.
        interval_s: Seconds between looks.
    """
    known = registry.stamp()
    while True:
        await asyncio.sleep(interval_s)
        stamp = registry.stamp()
        if stamp == known:
            continue
        before = registry.current.digest
        try:
            try:
                fresh = await asyncio.to_thread(registry.read_next)
            except ConfigError as error:
                await record("admin:template:changed", by="files", refused=True, reason=str(error)[:500], before=before)
            else:
                if fresh.digest != before:
                    await record("admin:template:changed", by="files", before=before, after=fresh.digest)
                    registry.adopt(fresh)
        except AuditUnavailableError:
            continue  # not on record, so not in force; the next look tries again
        known = stamp
