"""The incident switch: what is quarantined now, in every replica within one poll of the store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select, update

from server.errors import ConflictError, NotFoundError
from server.store.database import next_seq
from server.store.tables import incidents

if TYPE_CHECKING:
    from sqlalchemy import Connection


class Quarantined(StrEnum):
    """What an incident can take out of service; the target of a subject is `tenant/subject`."""

    KEY = "key"
    SUBJECT = "subject"
    TENANT = "tenant"
    MODEL = "model"
    TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class Incident:
    """One incident; open while `lifted_at_s` is None.

    `across_tenants`: who opened it manages all tenants, and only such a one may lift it.
    """

    id: int
    kind: Quarantined
    target: str
    reason: str
    opened_at_s: float
    opened_by: str
    lifted_at_s: float | None = None
    lifted_by: str | None = None
    seq: int = 0
    across_tenants: bool = True


class Quarantine:
    """What is quarantined now, in memory; asked on the path of a request.

    `load` replaces the whole set at once, so a reader sees the old one or the new one.
    """

    def __init__(self) -> None:
        self._open: frozenset[tuple[str, str]] = frozenset()

    def load(self, opened: list[Incident]) -> None:
        """Take over the open incidents."""
        self._open = frozenset((str(incident.kind), incident.target) for incident in opened)

    def has(self, kind: Quarantined, target: str) -> bool:
        """Whether `target` is out of service now."""
        return bool(self._open) and (str(kind), target) in self._open

    @property
    def is_empty(self) -> bool:
        """Whether nothing is out of service."""
        return not self._open


def open_incident(
    connection: Connection,
    kind: Quarantined,
    target: str,
    *,
    reason: str,
    by: str,
    at_s: float,
    across_tenants: bool = True,
) -> Incident:
    """Quarantine `target`.

    One that a tenant has opened stands in no way of one across tenants: the tenant could lift its own.

    Raises:
        ConflictError: It is quarantined already.
    """
    same = [found for found in list_incidents(connection) if found.target == target and found.kind == kind]
    if any(found.across_tenants >= across_tenants for found in same):
        raise ConflictError(f"This {kind} is quarantined already.")
    seq = next_seq(connection)
    values: dict[str, Any] = {
        "kind": str(kind),
        "target": target,
        "reason": reason[:256],
        "opened_at_s": at_s,
        "opened_by": by,
        "seq": seq,
        "across_tenants": across_tenants,
    }
    key = connection.execute(insert(incidents).values(**values)).inserted_primary_key
    if key is None:
        raise AssertionError("the database gave no id")
    return _get(connection, int(key[0]))


def lift_incident(connection: Connection, incident_id: int, *, by: str, at_s: float) -> Incident:
    """Put what was quarantined back into service.

    Raises:
        NotFoundError: There is no such incident.
        ConflictError: It was lifted already.
    """
    if _get(connection, incident_id).lifted_at_s is not None:
        raise ConflictError("This incident was lifted already.")
    seq = next_seq(connection)
    connection.execute(
        update(incidents).where(incidents.c.id == incident_id).values(lifted_at_s=at_s, lifted_by=by, seq=seq)
    )
    return _get(connection, incident_id)


def list_incidents(connection: Connection, *, with_lifted: bool = False) -> list[Incident]:
    """Return the open incidents, oldest first; on request the lifted ones too."""
    query = select(incidents).order_by(incidents.c.id)
    if not with_lifted:
        query = query.where(incidents.c.lifted_at_s.is_(None))
    return [_from_mapping(dict(row)) for row in connection.execute(query).mappings()]


def _get(connection: Connection, incident_id: int) -> Incident:
    row = connection.execute(select(incidents).where(incidents.c.id == incident_id)).mappings().first()
    if row is None:
        raise NotFoundError("There is no incident of this number.")
    return _from_mapping(dict(row))


def _from_mapping(values: dict[str, Any]) -> Incident:
    return Incident(**(values | {"kind": Quarantined(values["kind"])}))
