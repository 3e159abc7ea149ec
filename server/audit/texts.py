"""Full texts, where policy asks for them: encrypted beside the log, under tenant keys whose destruction erases them."""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import struct
import threading
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from server.audit.log import sync_folder
from server.errors import AuditLogError, AuditUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY_BYTES = 32
MAX_TEXT_BYTES = 16 * 1024 * 1024
_NONCE_BYTES = 12
_FRAME = struct.Struct(">4sIH")  # magic, sealed length, length of the request id
_MAGIC = b"SRt1"
_RECHECK_S = 2.0
_MAX_CACHED = 4_096


def _folder_name(tenant: str) -> str:
    """Return a name that gives no tenant away and fits every file system."""
    return sha256(b"strongroom tenant\x00" + tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class TenantKeys:
    """One random key a tenant, wrapped, each in a file that can be destroyed.

    The key names texts (HMAC) in the log and encrypts them in the store. Once it is destroyed nobody can read the texts
    or confirm a guess of one, and the log verifies as before, since it never held either.

    Args:
        directory: Where the wrapped keys lie; made with mode 0700.
        secret: The log's text key; the wrapping key is derived from it.
    """

    def __init__(self, directory: Path, secret: bytes) -> None:
        if len(secret) < KEY_BYTES:
            raise ValueError(f"The audit text key needs at least {KEY_BYTES} bytes.")
        self._directory = directory
        self._wrap = AESGCM(hmac.digest(secret, b"strongroom tenant key wrap v1", "sha256"))
        self._cache: dict[str, tuple[float, tuple[int, int], bytes]] = {}
        self._lock = threading.Lock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, tenant: str) -> bytes:
        """Return the tenant's key, drawn and made durable at its first use.

        A key that another process destroyed is noticed within two seconds.

        Raises:
            AuditUnavailableError: The key can't be read or stored.
        """
        cached = self._cache.get(tenant)
        if cached is not None and time.monotonic() < cached[0]:
            return cached[2]
        with self._lock:
            try:
                return self._load(tenant, cached)
            except (OSError, InvalidTag, ValueError) as err:
                raise AuditUnavailableError("A tenant's audit key can't be read; tell the operator.") from err

    def _load(self, tenant: str, cached: tuple[float, tuple[int, int], bytes] | None) -> bytes:
        path = self._path(tenant)
        try:
            info = path.stat()
        except FileNotFoundError:
            self._draw(tenant, path)
            info = path.stat()
        stamp = info.st_ino, info.st_mtime_ns
        if cached is not None and cached[1] == stamp:
            key = cached[2]
        else:
            data = path.read_bytes()
            key = self._wrap.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], self._context(tenant))
        if len(self._cache) >= _MAX_CACHED:
            self._cache.clear()
        self._cache[tenant] = time.monotonic() + _RECHECK_S, stamp, key
        return key

    def _draw(self, tenant: str, path: Path) -> None:
        nonce = os.urandom(_NONCE_BYTES)
        data = nonce + self._wrap.encrypt(nonce, os.urandom(KEY_BYTES), self._context(tenant))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(temporary, path)  # the first of several processes wins, and all read what it drew
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        sync_folder(self._directory)

    def destroy(self, tenant: str) -> bool:
        """Destroy the tenant's key; return whether there was one. What it encrypted can't be read again."""
        path = self._path(tenant)
        self._cache.pop(tenant, None)
        if not path.exists():
            return False
        with path.open("r+b") as file:  # overwritten first: an unlinked file's blocks can be found again
            file.write(os.urandom(path.stat().st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        sync_folder(self._directory)
        return True

    def exists(self, tenant: str) -> bool:
        """Whether the tenant has a key now."""
        return self._path(tenant).exists()

    def _path(self, tenant: str) -> Path:
        return self._directory / f"{_folder_name(tenant)}.key"

    @staticmethod
    def _context(tenant: str) -> bytes:
        return b"strongroom tenant key v1\x00" + tenant.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class StoredText:
    """One text that was kept: `kind` is `prompt` or `answer`."""

    request_id: str
    kind: str
    time: str
    text: str


class TextStore:
    """Appends texts to one file a tenant and day; a frame is sealed to its tenant and request.

    Args:
        directory: Where the files lie; made with mode 0700.
        keys: The tenants' keys.
        redact: Takes secrets out of a text before anything is stored; the guard's.
    """

    def __init__(self, directory: Path, keys: TenantKeys, *, redact: Callable[[str], str]) -> None:
        self._directory = directory
        self._keys = keys
        self._redact = redact
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, tenant: str, request_id: str, kind: str, text: str) -> None:
        """Store a text, durable on return.

        Raises:
            AuditUnavailableError: It could not be stored; the request must not go on.
        """
        now = datetime.now(UTC)
        fields = {"kind": kind, "time": now.isoformat(timespec="microseconds"), "text": self._redact(text)}
        plain = json.dumps(fields).encode()
        if len(plain) > MAX_TEXT_BYTES:
            raise AuditUnavailableError("A text that policy wants kept is too long to be stored.")
        identifier = request_id.encode()
        nonce = os.urandom(_NONCE_BYTES)
        context = self._context(tenant, identifier)
        sealed = nonce + AESGCM(self._keys.get(tenant)).encrypt(nonce, plain, context)
        frame = _FRAME.pack(_MAGIC, len(sealed), len(identifier)) + identifier + sealed
        folder = self._directory / _folder_name(tenant)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._append(folder / f"{now.date().isoformat()}.texts", frame)
        except OSError as err:
            raise AuditUnavailableError("A text that policy wants kept could not be stored.") from err

    @staticmethod
    def _append(path: Path, frame: bytes) -> None:
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                if os.write(descriptor, frame) != len(frame):
                    raise OSError(28, "No space left on device")
                os.fdatasync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(path.parent)

    def read(self, tenant: str, request_id: str | None = None) -> Iterator[StoredText]:
        """Yield the tenant's texts, oldest first; of one request or of all.

        Raises:
            AuditLogError: The key was destroyed, or a frame was changed.
        """
        folder = self._directory / _folder_name(tenant)
        if not self._keys.exists(tenant):
            raise AuditLogError("The tenant has no key: its texts were destroyed, or there never were any.")
        cipher = AESGCM(self._keys.get(tenant))
        for path in sorted(folder.glob("*.texts")):
            yield from self._read_file(path, tenant, request_id, cipher)

    def _read_file(self, path: Path, tenant: str, wanted: str | None, cipher: AESGCM) -> Iterator[StoredText]:
        with path.open("rb") as file:
            while header := file.read(_FRAME.size):
                if len(header) < _FRAME.size:
                    return  # torn by a power cut: its request was never answered
                magic, length, id_length = _FRAME.unpack(header)
                if magic != _MAGIC or length > MAX_TEXT_BYTES + 64:
                    raise AuditLogError(f"{path.name} is damaged.")
                identifier, sealed = file.read(id_length), file.read(length)
                if len(sealed) < length:
                    return
                if wanted is not None and identifier != wanted.encode():
                    continue
                try:
                    context = self._context(tenant, identifier)
                    plain = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
                except InvalidTag:
                    if wanted is None:  # sealed under a key that was destroyed, or changed: either way unreadable
                        continue
                    raise AuditLogError(
                        f"The text in {path.name} was sealed under a key that was destroyed, or it was changed."
                    ) from None
                yield StoredText(identifier.decode(), **json.loads(plain))

    def prune(self, keep_days: int, today: date | None = None) -> int:
        """Delete the files of days that are older; return how many."""
        limit = (today or datetime.now(UTC).date()) - timedelta(days=keep_days)
        old = [path for path in self._directory.glob("*/*.texts") if date.fromisoformat(path.stem) < limit]
        for path in old:
            path.unlink()
        return len(old)

    @staticmethod
    def _context(tenant: str, request_id: bytes) -> bytes:
        name = tenant.encode("utf-8", "surrogatepass")
        return b"strongroom audit text v1\x00" + len(name).to_bytes(4, "big") + name + request_id
