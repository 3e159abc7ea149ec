"""API keys: `sr_<id>_<secret>` to a principal, in constant time and from memory."""

from __future__ import annotations

import hmac
import re
import secrets
import string
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import AuthenticationError
from server.types import Principal, Secret, SubjectId, TenantId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from server.auth.pepper import Pepper
    from server.store.keys import KeyRow

PREFIX = "sr_"
ID_LENGTH = 12
SECRET_LENGTH = 43  # of 62 letters: 256 bits
MAX_CREDENTIAL_CHARS = 8192
_ID_LETTERS = string.ascii_lowercase + string.digits
_SECRET_LETTERS = string.ascii_letters + string.digits
_KEY = re.compile(rf"sr_([a-z0-9]{{{ID_LENGTH}}})_([A-Za-z0-9]{{{SECRET_LENGTH}}})", re.ASCII)
_NO_DIGEST = bytes(32)


def find_keys(text: str) -> list[str]:
    """Return every key of our form that stands somewhere in a text."""
    return [found.group() for found in _KEY.finditer(text)]


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just drawn: the text is shown once, only the digest is kept."""

    id: str
    text: Secret
    digest: str
    pepper: int


def new_key(pepper: Pepper) -> NewKey:
    """Draw a key."""
    key_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(ID_LENGTH))
    text = f"{PREFIX}{key_id}_" + "".join(secrets.choice(_SECRET_LETTERS) for _ in range(SECRET_LENGTH))
    return NewKey(key_id, Secret(text), pepper.digest(text, pepper.current).hex(), pepper.current)


def parse_key_id(text: str) -> str | None:
    """Return the public id in a key of our form, or None for any other text."""
    matched = _KEY.fullmatch(text)
    return matched.group(1) if matched else None


def import_id(digest: str) -> str:
    """Return the id of a key that was made elsewhere: derived from its digest, so that it is found in one look-up."""
    return f"x{digest[:15]}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key as the ring holds it: digest as bytes, principal made once."""

    digest: bytes
    pepper: int
    principal: Principal
    revoked: bool


class KeyRing:
    """All keys in memory, by id.

    Args:
        pepper: What the digests were made under.
        clock: Seconds since the epoch.
    """

    def __init__(self, pepper: Pepper, *, clock: Callable[[], float] = time.time) -> None:
        self._pepper = pepper
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._used: dict[str, float] = {}
        self._used_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, rows: Iterable[KeyRow]) -> None:
        """Take over new and changed keys. A single dict update a key, so a reader sees the old or the new one."""
        for row in rows:
            principal = Principal(
                SubjectId(row.subject),
                TenantId(row.tenant),
                row.groups,
                row.scopes,
                "api_key",
                row.id,
                row.expires_at_s,
            )
            entry = _Entry(bytes.fromhex(row.digest), row.pepper, principal, row.revoked_at_s is not None)
            self._entries[row.id] = entry

    def authenticate(self, text: str) -> Principal:
        """Return whose key this is.

        Every text costs one digest and one comparison of equal length, whether the id is known or not, so the time
        tells nothing of which ids exist or how much of a key was right.

        Raises:
            AuthenticationError: The key is unknown, wrong, revoked or expired; `reason` says which.
        """
        key_id = parse_key_id(text)
        if key_id is not None:
            return self._check(key_id, text)
        for number in self._pepper.numbers:  # a key made elsewhere: its id is derived from its digest
            digest = self._pepper.digest(text, number).hex()
            if import_id(digest) in self._entries:
                return self._check(import_id(digest), text)
        raise AuthenticationError("unknown key")

    def is_revoked(self, key_id: str) -> bool:
        """Whether the key was revoked, ran out, or was never here."""
        entry = self._entries.get(key_id)
        return entry is None or entry.revoked or self._is_expired(entry)

    def now_s(self) -> float:
        """Return the ring's time, in seconds since the epoch."""
        return self._clock()

    def take_used(self) -> dict[str, float]:
        """Return when keys were used since the last call."""
        with self._used_lock:
            used, self._used = self._used, {}
        return used

    def _check(self, key_id: str, text: str) -> Principal:
        entry = self._entries.get(key_id)
        digest = self._pepper.digest(text, entry.pepper if entry is not None else self._pepper.current)
        is_equal = hmac.compare_digest(digest, entry.digest if entry is not None else _NO_DIGEST)
        if entry is None:
            raise AuthenticationError("unknown key", key_id=key_id)
        if not is_equal:
            raise AuthenticationError("wrong secret", key_id=key_id)
        if entry.revoked:
            raise AuthenticationError("revoked key", key_id=key_id)
        if self._is_expired(entry):
            raise AuthenticationError("expired key", key_id=key_id)
        with self._used_lock:
            self._used[key_id] = self._clock()
        return entry.principal

    def _is_expired(self, entry: _Entry) -> bool:
        expires_at_s = entry.principal.expires_at_s
        return expires_at_s is not None and self._clock() >= expires_at_s
