"""Making, rotating, revoking and importing keys: each act changes the store and the audit log together, or neither."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from server.auth.api_key import import_id, new_key, parse_key_id
from server.auth.names import parse_name
from server.errors import ConflictError, NotFoundError, RequestError
from server.store.keys import KeyRow, expire_key, find_key_by_digest, get_key, insert_keys, list_keys, revoke_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.auth.pepper import Pepper
    from server.store.database import Store
    from server.types import Secret

# What a key made elsewhere must have at least, since its strength is not ours to know.
MIN_IMPORTED_CHARS = 32
MAX_LIFE_S = 10 * 366 * 86400.0


class Record(Protocol):
    """Puts an act on the audit log; returns once it is durable."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Append one event.

        Raises:
            AuditUnavailableError: The log can't be written; the act must not happen.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeySpec:
    """Whose key, and what for."""

    subject: str
    tenant: str
    groups: frozenset[str]
    scopes: frozenset[str]
    expires_at_s: float | None = None
    note: str = ""


class KeyAdmin:
    """The acts on keys, for the command line and the admin listener.

    Args:
        store: Where keys are kept.
        pepper: What they are kept under.
        record: The audit log.
        by: Who acts.
    """

    def __init__(self, store: Store, pepper: Pepper, *, record: Record, by: str) -> None:
        self._store = store
        self._pepper = pepper
        self._record = record
        self._by = by

    def create(self, spec: KeySpec) -> tuple[KeyRow, Secret]:
        """Draw a key; its text is never to be had again.

        Raises:
            RequestError: A name or the expiry can't be used.
            AuditUnavailableError: The act can't be put on record; no key is made.
        """
        row, text = self._draw(_checked(spec, self._store.clock()))
        with self._store.write() as connection:
            insert_keys(connection, [row])
            self._log("admin:api-key:created", row)
        return row, text

    def rotate(self, key_id: str, *, overlap_s: float) -> tuple[KeyRow, Secret]:
        """Draw a successor with the same rights; the old key ends after the overlap.

        Raises:
            NotFoundError: There is no such key.
            ConflictError: It is revoked or expired.
        """
        now_s = self._store.clock()
        if overlap_s < 0:
            raise RequestError("The overlap can't be negative.", param="overlap")
        with self._store.write() as connection:
            old = get_key(connection, key_id)
            if old.revoked_at_s is not None or (old.expires_at_s is not None and old.expires_at_s <= now_s):
                raise ConflictError("This key is revoked or expired; create a new one instead.")
            row, text = self._draw(KeySpec(old.subject, old.tenant, old.groups, old.scopes, old.expires_at_s, old.note))
            row = replace(row, replaces=old.id)
            insert_keys(connection, [row])
            expire_key(connection, old.id, at_s=now_s + overlap_s)
            self._log("admin:api-key:rotated", row, replaces=old.id, overlap_s=int(overlap_s))
        return row, text

    def revoke(self, key_id: str, *, reason: str) -> KeyRow:
        """End a key now; every replica hears of it within seconds, running streams too.

        Raises:
            NotFoundError: There is no such key.
        """
        with self._store.write() as connection:
            row = revoke_key(connection, key_id, reason=reason, at_s=self._store.clock())
            self._log("admin:api-key:revoked", row, reason=reason[:256])
        return row

    def revoke_leaked(self, text: str, *, reason: str) -> KeyRow:
        """End the key whose text was found somewhere.

        Raises:
            NotFoundError: It is none of ours.
        """
        for number in self._pepper.numbers:
            with self._store.read() as connection:
                row = find_key_by_digest(connection, self._pepper.digest(text, number).hex())
            if row is not None:
                return self.revoke(row.id, reason=reason)
        raise NotFoundError("This is none of our keys.")

    def revoke_digest(self, digest: str, *, reason: str) -> KeyRow:
        """End the key with this stored digest, as 'keys show' prints it.

        Raises:
            NotFoundError: There is none.
        """
        with self._store.read() as connection:
            row = find_key_by_digest(connection, digest)
        if row is None:
            raise NotFoundError("There is no key with this digest.")
        return self.revoke(row.id, reason=reason)

    def import_keys(self, keys: Iterable[tuple[str, KeySpec]]) -> list[KeyRow]:
        """Take over keys that callers hold already: all of them, or none.

        Args:
            keys: The key's text, and whose it is. Texts of our own form keep their id.

        Raises:
            RequestError: A text is too short to be a key, or a name can't be used; says which in the list.
            ConflictError: One is there already.
        """
        now_s = self._store.clock()
        rows = []
        for number, (text, spec) in enumerate(keys, start=1):
            if len(text) < MIN_IMPORTED_CHARS or len(set(text)) < 10 or not text.isascii() or not text.isprintable():
                raise RequestError(
                    f"Key {number} of the list is too weak: it needs at least {MIN_IMPORTED_CHARS} printable ASCII "
                    "characters, 10 of them different."
                )
            digest = self._pepper.digest(text, self._pepper.current).hex()
            key_id = parse_key_id(text) or import_id(digest)
            rows.append(self._row(key_id, digest, self._pepper.current, _checked(spec, now_s)))
        with self._store.write() as connection:
            insert_keys(connection, rows)
            for row in rows:
                self._log("admin:api-key:created", row, imported=True)
        return rows

    def list(self, *, tenant: str | None = None) -> list[KeyRow]:
        """Return all keys, or those of one tenant."""
        with self._store.read() as connection:
            return list_keys(connection, tenant=tenant)

    def get(self, key_id: str) -> KeyRow:
        """Return one key.

        Raises:
            NotFoundError: There is no such key.
        """
        with self._store.read() as connection:
            return get_key(connection, key_id)

    def _draw(self, spec: KeySpec) -> tuple[KeyRow, Secret]:
        drawn = new_key(self._pepper)
        return self._row(drawn.id, drawn.digest, drawn.pepper, spec), drawn.text

    def _row(self, key_id: str, digest: str, pepper: int, spec: KeySpec) -> KeyRow:
        return KeyRow(
            id=key_id,
            digest=digest,
            pepper=pepper,
            subject=spec.subject,
            tenant=spec.tenant,
            groups=spec.groups,
            scopes=spec.scopes,
            note=spec.note,
            created_at_s=self._store.clock(),
            created_by=self._by,
            expires_at_s=spec.expires_at_s,
        )

    def _log(self, event: str, row: KeyRow, **fields: Any) -> None:
        self._record(
            event,
            by=self._by,
            key_id=row.id,
            subject=row.subject,
            tenant=row.tenant,
            groups=sorted(row.groups),
            scopes=sorted(row.scopes),
            **fields,
        )


def describe_key(row: KeyRow, now_s: float) -> dict[str, Any]:
    """Return what may be shown of a key: never enough to use it."""
    state = "active"
    if row.expires_at_s is not None and row.expires_at_s <= now_s:
        state = "expired"
    if row.revoked_at_s is not None:
        state = "revoked"
    return {
        "id": row.id,
        "state": state,
        "subject": row.subject,
        "tenant": row.tenant,
        "groups": sorted(row.groups),
        "scopes": sorted(row.scopes),
        "note": row.note,
        "created_at_s": row.created_at_s,
        "created_by": row.created_by,
        "expires_at_s": row.expires_at_s,
        "last_used_at_s": row.last_used_at_s,
        "revoked_at_s": row.revoked_at_s,
        "revoked_reason": row.revoked_reason,
        "replaces": row.replaces,
        "digest": row.digest,
    }


def _checked(spec: KeySpec, now_s: float) -> KeySpec:
    try:
        parse_name(spec.subject, "subject")
        parse_name(spec.tenant, "tenant")
        for group in spec.groups:
            parse_name(group, "group")
    except ValueError as error:
        raise RequestError(f"This key can't be made: {error}.") from error
    if not spec.scopes:
        raise RequestError(
            "A key without a scope could do nothing; give at least one, such as model:*.", param="scopes"
        )
    if spec.expires_at_s is not None and not now_s < spec.expires_at_s < now_s + MAX_LIFE_S:
        raise RequestError("The expiry must lie ahead, by at most ten years.", param="expires")
    return spec
