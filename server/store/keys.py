"""Rows of API keys: what is stored of a key, never the key itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select, update

from server.errors import ConflictError, NotFoundError
from server.store.database import next_seq
from server.store.tables import keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import Connection, Row


@dataclass(frozen=True, slots=True)
class KeyRow:
    """What is stored of one key. `digest` is the lowercase hex HMAC-SHA-256 under pepper number `pepper`."""

    id: str
    digest: str
    pepper: int
    subject: str
    tenant: str
    groups: frozenset[str]
    scopes: frozenset[str]
    note: str
    created_at_s: float
    created_by: str
    expires_at_s: float | None = None
    revoked_at_s: float | None = None
    revoked_reason: str | None = None
    replaces: str | None = None
    last_used_at_s: float | None = None
    seq: int = 0


def insert_keys(connection: Connection, rows: Iterable[KeyRow]) -> None:
    """Add keys under one change number.

    Raises:
        ConflictError: An id or a digest is there already.
    """
    new = list(rows)
    ids = [row.id for row in new]
    digests = [row.digest for row in new]
    for start in range(0, len(new), 500):  # SQLite takes a bounded number of parameters
        taken = connection.scalars(
            select(keys.c.id).where(
                keys.c.id.in_(ids[start : start + 500]) | keys.c.digest.in_(digests[start : start + 500])
            )
        ).first()
        if taken is not None:
            raise ConflictError(f"Key {taken} is there already; list it with 'strongroom keys show {taken}'.")
    if len(set(ids)) != len(ids) or len(set(digests)) != len(digests):
        raise ConflictError("The same key appears twice in what is to be added.")
    seq = next_seq(connection)
    if new:
        connection.execute(insert(keys), [_to_row(row, seq) for row in new])


def get_key(connection: Connection, key_id: str) -> KeyRow:
    """Return one key.

    Raises:
        NotFoundError: There is none of this id.
    """
    row = connection.execute(select(keys).where(keys.c.id == key_id)).first()
    if row is None:
        raise NotFoundError("There is no key of this id; see 'strongroom keys list'.")
    return _from_row(row)


def find_key_by_digest(connection: Connection, digest: str) -> KeyRow | None:
    """Return the key with this digest, or None."""
    row = connection.execute(select(keys).where(keys.c.digest == digest.lower())).first()
    return None if row is None else _from_row(row)


def list_keys(connection: Connection, *, tenant: str | None = None, since_seq: int = 0) -> list[KeyRow]:
    """Return keys in order of id: of one tenant, or of all; only those changed after `since_seq`."""
    query = select(keys).where(keys.c.seq > since_seq).order_by(keys.c.id)
    if tenant is not None:
        query = query.where(keys.c.tenant == tenant)
    return [_from_row(row) for row in connection.execute(query)]


def revoke_key(connection: Connection, key_id: str, *, reason: str, at_s: float) -> KeyRow:
    """Mark a key revoked; the first revocation stays.

    Raises:
        NotFoundError: There is none of this id.
    """
    row = get_key(connection, key_id)
    if row.revoked_at_s is None:
        seq = next_seq(connection)
        connection.execute(
            update(keys).where(keys.c.id == key_id).values(revoked_at_s=at_s, revoked_reason=reason[:256], seq=seq)
        )
    return get_key(connection, key_id)


def expire_key(connection: Connection, key_id: str, *, at_s: float) -> None:
    """Bring a key's expiry forward to `at_s`; it is never put off."""
    row = get_key(connection, key_id)
    if row.expires_at_s is None or row.expires_at_s > at_s:
        seq = next_seq(connection)
        connection.execute(update(keys).where(keys.c.id == key_id).values(expires_at_s=at_s, seq=seq))


def touch_keys(connection: Connection, last_used: Mapping[str, float]) -> None:
    """Write when keys were last used; no change number, since no replica needs to hear of it."""
    for key_id, at_s in last_used.items():
        connection.execute(
            update(keys)
            .where(keys.c.id == key_id, (keys.c.last_used_at_s.is_(None)) | (keys.c.last_used_at_s < at_s))
            .values(last_used_at_s=at_s)
        )


def dump_names(names: Iterable[str]) -> str:
    """Return a set of names as a JSON array, sorted."""
    return json.dumps(sorted(set(names)), ensure_ascii=False, separators=(",", ":"))


def _to_row(row: KeyRow, seq: int) -> dict[str, Any]:
    return {
        "id": row.id,
        "digest": row.digest,
        "pepper": row.pepper,
        "subject": row.subject,
        "tenant": row.tenant,
        "groups": dump_names(row.groups),
        "scopes": dump_names(row.scopes),
        "note": row.note[:256],
        "created_at_s": row.created_at_s,
        "created_by": row.created_by,
        "expires_at_s": row.expires_at_s,
        "revoked_at_s": row.revoked_at_s,
        "revoked_reason": row.revoked_reason,
        "replaces": row.replaces,
        "last_used_at_s": row.last_used_at_s,
        "seq": seq,
    }


def _from_row(row: Row[Any]) -> KeyRow:
    values = dict(row._mapping)
    values["groups"] = frozenset(json.loads(values["groups"]))
    values["scopes"] = frozenset(json.loads(values["scopes"]))
    return KeyRow(**values)
