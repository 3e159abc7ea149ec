"""Usage by hour: what was spent, by whom, on which model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite

from server.store.tables import usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Insert

HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class UsageKey:
    """Whose usage, of what, in which hour (`hour` is the epoch divided by 3600); `teams` is a sorted JSON array."""

    hour: int
    tenant: str
    subject: str
    key_id: str
    teams: str
    model: str


@dataclass(slots=True)
class Spent:
    """What was spent; `cost_micros` is in millionths of the currency that the prices are in."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_micros: int = 0


def add_usage(connection: Connection, spent: Mapping[UsageKey, Spent]) -> None:
    """Add to the counts of each hour; what other replicas added stays."""
    if spent:
        ordered = sorted(spent.items(), key=lambda item: repr(item[0]))  # one order: no deadlock of two replicas
        connection.execute(_upsert(connection.dialect.name), [asdict(key) | asdict(value) for key, value in ordered])


@cache
def _upsert(dialect_name: str) -> Insert:
    """Return the statement, made once: each one that is made leaves a hundred objects to the cycle collector."""
    dialect = postgresql if dialect_name == "postgresql" else sqlite
    statement: postgresql.Insert | sqlite.Insert = dialect.insert(usage)
    return statement.on_conflict_do_update(
        index_elements=list(usage.primary_key.columns),
        set_={field.name: usage.c[field.name] + statement.excluded[field.name] for field in fields(Spent)},
    )


def list_usage(
    connection: Connection, *, from_hour: int, to_hour: int, tenant: str | None = None
) -> list[tuple[UsageKey, Spent]]:
    """Return usage of the hours `from_hour <= hour < to_hour`: of one tenant, or of all."""
    query = select(usage).where(usage.c.hour >= from_hour, usage.c.hour < to_hour).order_by(*usage.primary_key.columns)
    if tenant is not None:
        query = query.where(usage.c.tenant == tenant)
    return [
        (
            UsageKey(row.hour, row.tenant, row.subject, row.key_id, row.teams, row.model),
            Spent(row.requests, row.prompt_tokens, row.completion_tokens, row.cost_micros),
        )
        for row in connection.execute(query)
    ]
