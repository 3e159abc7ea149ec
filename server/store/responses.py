"""Responses that callers asked to keep: sealed under the tenant's key, found by their owner alone, gone in time."""

from __future__ import annotations

import hmac
import os
import struct
from typing import TYPE_CHECKING, Any

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import and_, delete, func, insert, select

from server.errors import NotFoundError, PayloadTooLargeError
from server.store.tables import responses

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import ColumnElement

    from server.store.database import Store

MAX_RECORD_BYTES = 4 * 1024 * 1024
MAX_PER_SUBJECT = 1000
MAX_BYTES_PER_SUBJECT = 64 * 1024 * 1024
"""Beyond either a subject's oldest ones go: one caller's room has an end, and keys and floors lie in the same store."""

_NONCE_BYTES = 12


class ResponseStore:
    """Keeps responses. Synchronous, so call it in a thread.

    Every query names tenant and subject, so that nobody's id finds anybody else's response; a row is sealed to the
    three, so that one that is moved or renamed in the database does not open.

    Args:
        store: The control data.
        key_of: A tenant's key; destroying it erases the tenant's responses.
        keep_s: How long a response is kept.
    """

    def __init__(self, store: Store, key_of: Callable[[str], bytes], *, keep_s: float) -> None:
        self._store = store
        self._key_of = key_of
        self._keep_s = keep_s

    def put(self, tenant: str, subject: str, response_id: str, record: dict[str, Any]) -> None:
        """Keep a record. What has expired goes on this occasion.

        Raises:
            PayloadTooLargeError: It is too large to be kept.
            UnavailableError: The store does not answer, or the tenant's key can't be read.
        """
        plain = orjson.dumps(record)
        if len(plain) > MAX_RECORD_BYTES:
            raise PayloadTooLargeError(
                f"The conversation has grown beyond the {MAX_RECORD_BYTES} bytes that are stored; send 'store': false."
            )
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher(tenant).encrypt(nonce, plain, _context(tenant, subject, response_id))
        now_s = self._store.clock()
        values = {"tenant": tenant, "subject": subject, "id": response_id, "sealed": sealed}
        with self._store.write() as connection:
            connection.execute(delete(responses).where(responses.c.expires_at_s <= now_s))
            connection.execute(
                insert(responses).values(**values, created_at_s=now_s, expires_at_s=now_s + self._keep_s)
            )
            mine = and_(responses.c.tenant == tenant, responses.c.subject == subject)
            sizes = select(responses.c.id, func.length(responses.c.sealed)).where(mine)
            num_kept = num_bytes = 0
            too_many = []
            for kept_id, size in connection.execute(sizes.order_by(responses.c.created_at_s.desc())):
                num_kept, num_bytes = num_kept + 1, num_bytes + size
                if num_kept > MAX_PER_SUBJECT or num_bytes > MAX_BYTES_PER_SUBJECT:
                    too_many.append(kept_id)
            if too_many:
                connection.execute(delete(responses).where(mine, responses.c.id.in_(too_many)))

    def get(self, tenant: str, subject: str, response_id: str) -> dict[str, Any]:
        """Return the record of one's own response.

        Raises:
            NotFoundError: There is none of this id, it has expired, it is somebody else's, or its key was destroyed.
            UnavailableError: The store does not answer, or the tenant's key can't be read.
        """
        if not response_id.isascii():
            raise unknown(response_id)
        query = select(responses.c.sealed).where(
            _own(tenant, subject, response_id), responses.c.expires_at_s > self._store.clock()
        )
        with self._store.read() as connection:
            sealed = connection.scalar(query)
        if sealed is None:
            raise unknown(response_id)
        context = _context(tenant, subject, response_id)
        try:
            plain = self._cipher(tenant).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except InvalidTag as err:
            raise unknown(response_id) from err
        record: dict[str, Any] = orjson.loads(plain)
        return record

    def delete(self, tenant: str, subject: str, response_id: str) -> None:
        """Delete one's own response.

        Raises:
            NotFoundError: There is none of this id, or it is somebody else's.
            UnavailableError: The store does not answer.
        """
        if not response_id.isascii():
            raise unknown(response_id)
        with self._store.write() as connection:
            found = connection.execute(delete(responses).where(_own(tenant, subject, response_id)))
        if found.rowcount == 0:
            raise unknown(response_id)

    def _cipher(self, tenant: str) -> AESGCM:
        return AESGCM(hmac.digest(self._key_of(tenant), b"strongroom stored response v1", "sha256"))


def unknown(response_id: str) -> NotFoundError:
    """Return the 404 that says nothing of whether somebody else has such a response."""
    return NotFoundError(
        f"There is no stored response {response_id[:80]!r} of yours: it was never stored (send 'store': true where "
        "policy permits it), it has expired, or it was deleted.",
        code="response_not_found",
    )


def _own(tenant: str, subject: str, response_id: str) -> ColumnElement[bool]:
    return and_(responses.c.tenant == tenant, responses.c.subject == subject, responses.c.id == response_id)


def _context(*names: str) -> bytes:
    """Return what a row is sealed to: each name after its length, so that no two triples spell the same bytes."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    return b"strongroom stored response v1\x00" + b"".join(struct.pack(">I", len(part)) + part for part in encoded)
