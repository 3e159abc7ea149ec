"""Sums usage for people to read: by tenant, team, subject, key, model or day."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from server.errors import RequestError
from server.store.usage import HOUR_S, list_usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.store.database import Store
    from server.store.usage import UsageKey

GROUPINGS = ("tenant", "team", "subject", "key", "model", "day")
COUNTED = ("requests", "prompt_tokens", "completion_tokens", "cost_micros")


def report_usage(
    store: Store, *, from_s: float, to_s: float, by: str, tenant: str | None = None
) -> list[dict[str, Any]]:
    """Return one row for each tenant, team and so on, the largest number of tokens first; days in order.

    A subject in several teams counts in each of them, so teams add up to more than the whole.

    Args:
        store: Where usage is kept.
        from_s: From the hour of this moment on.
        to_s: Before the hour of this moment.
        by: One of `GROUPINGS`.
        tenant: Only this tenant's.

    Raises:
        RequestError: `by` is none of these.
    """
    if by not in GROUPINGS:
        raise RequestError(f"Usage is summed by {', '.join(GROUPINGS)}.", param="by")
    totals: dict[tuple[str, str], dict[str, int]] = {}
    with store.read() as connection:
        rows = list_usage(connection, from_hour=int(from_s // HOUR_S), to_hour=int(-(-to_s // HOUR_S)), tenant=tenant)
    for key, spent in rows:
        for name in _names(key, by):
            total = totals.setdefault(name, dict.fromkeys(COUNTED, 0))
            for field in COUNTED:
                total[field] += getattr(spent, field)
    table = [{"tenant": whose, by: name, **total} for (whose, name), total in totals.items()]
    if by == "day":
        return sorted(table, key=lambda row: (str(row["day"]), str(row["tenant"])))
    return sorted(table, key=lambda row: (-int(row["prompt_tokens"]) - int(row["completion_tokens"]), str(row[by])))


def _names(key: UsageKey, by: str) -> Iterator[tuple[str, str]]:
    if by == "team":
        for team in json.loads(key.teams):
            yield key.tenant, team
    elif by == "day":
        yield key.tenant, datetime.fromtimestamp(key.hour * HOUR_S, tz=UTC).strftime("%Y-%m-%d")
    else:
        yield key.tenant, {"tenant": key.tenant, "subject": key.subject, "key": key.key_id, "model": key.model}[by]


def parse_day_s(text: str, name: str) -> float:
    """Return the first second, UTC, of a day such as 2026-11-22.

    Raises:
        RequestError: It is none.
    """
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise RequestError(f"'{name}' must be a day such as 2026-11-22.", param=name) from error
