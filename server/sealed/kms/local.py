"""The local key file: a random key, mode 0600, outside the model folder, optionally under a passphrase (scrypt)."""

from __future__ import annotations

import base64
import os
import secrets
import stat
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from server.errors import KMSDeniedError, KMSDisabledError, KMSError, SealError
from server.sealed.format import Recipient, canonical_json, parse_canonical
from server.sealed.kms.base import DATA_KEY_BYTES, DataKey, wrong_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.sealed.kms.base import KeyContext

MECHANISM: Final = "file"
_FORMAT: Final = "strongroom.kms-key/v1"
_NONCE_BYTES: Final = 12
_MAX_FILE_BYTES: Final = 4096
# scrypt at 2^17·8·1: 128 MiB and about half a second a guess, OWASP's first choice.
_SCRYPT_LOG2_N: Final = 17
_MAX_SCRYPT_LOG2_N: Final = 20


class LocalKMS:
    """One key file.

    Args:
        path: The key file; mode 0600, owned by this user or root.
        passphrase: Asked for the passphrase when the file has one.
        entropy: Source of nonces; only vectors fix it.
    """

    mechanism = MECHANISM

    def __init__(
        self,
        path: Path,
        *,
        passphrase: Callable[[], str] | None = None,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._path = path
        self._entropy = entropy
        self._kek = _load_key(path, passphrase)
        self.key_id = (
            HKDF(algorithm=SHA256(), length=16, salt=None, info=b"strongroom/v1/kms-key-id")
            .derive(bytes(self._kek))
            .hex()
        )

    @property
    def path(self) -> Path:
        """Where the key file is; it must not be inside a model folder."""
        return self._path

    def wrap(self, data_key: DataKey, context: KeyContext) -> Recipient:
        """Wrap with AES-256-GCM, the context as associated data."""
        nonce = self._entropy(_NONCE_BYTES)
        sealed = AESGCM(bytes(self._kek)).encrypt(nonce, bytes(data_key.reveal()), context.canonical())
        return Recipient(MECHANISM, self.key_id, nonce + sealed)

    def unwrap(self, recipient: Recipient, context: KeyContext) -> DataKey:
        """Open what `wrap` made.

        Raises:
            KMSDisabledError: The key file is gone since.
            KMSDeniedError: Wrong key, wrong context or damage.
        """
        if not self._path.exists():
            raise KMSDisabledError(f"The key file {self._path} is gone. Put it back to open models sealed for it.")
        nonce, sealed = recipient.wrapped[:_NONCE_BYTES], recipient.wrapped[_NONCE_BYTES:]
        if recipient.key_id != self.key_id or len(sealed) != DATA_KEY_BYTES + 16:
            raise wrong_key(f"it is not wrapped for the key {self.key_id}")
        try:
            return DataKey(AESGCM(bytes(self._kek)).decrypt(nonce, sealed, context.canonical()))
        except InvalidTag as err:
            raise wrong_key("wrong context or a damaged wrapped key") from err


def create_key_file(path: Path, *, passphrase: str | None = None) -> None:
    """Draw a new key and write it to `path` with mode 0600; never overwrites.

    Raises:
        KMSError: The file exists or cannot be written.
    """
    kek = secrets.token_bytes(DATA_KEY_BYTES)
    kdf: dict[str, object] = {"name": "none"}
    stored = kek
    if passphrase is not None:
        salt = secrets.token_bytes(16)
        kdf = {"name": "scrypt", "log2_n": _SCRYPT_LOG2_N, "salt": base64.b64encode(salt).decode()}
        # The nonce is fixed: salt and so the key are drawn for this one file.
        stored = AESGCM(_stretch(passphrase, salt, _SCRYPT_LOG2_N)).encrypt(bytes(_NONCE_BYTES), kek, None)
    content = canonical_json({"format": _FORMAT, "kdf": kdf, "key": base64.b64encode(stored).decode()})
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as err:
        raise KMSError(f"The key file {path} exists already; it is never overwritten.") from err
    except OSError as err:
        raise KMSError(f"The key file {path} cannot be written: {err.strerror}.") from err
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _load_key(path: Path, passphrase: Callable[[], str] | None) -> bytes:
    content = _read_private(path)
    damaged = KMSError(f"The key file {path} is not one that strongroom wrote. Restore it from a backup.")
    try:
        fields = parse_canonical(content, str(path))
        kdf = fields["kdf"]
        stored = base64.b64decode(fields["key"], validate=True)
        name = kdf["name"]
        if fields.keys() != {"format", "kdf", "key"} or fields["format"] != _FORMAT:
            raise damaged
        if name == "none":
            kek = stored
        elif name == "scrypt" and 14 <= kdf["log2_n"] <= _MAX_SCRYPT_LOG2_N:
            if passphrase is None:
                raise KMSDeniedError(f"The key file {path} is under a passphrase and none was given.")
            key = _stretch(passphrase(), base64.b64decode(kdf["salt"], validate=True), kdf["log2_n"])
            kek = AESGCM(key).decrypt(bytes(_NONCE_BYTES), stored, None)
        else:
            raise damaged
    except InvalidTag as err:
        raise KMSDeniedError(f"The passphrase does not open the key file {path}.") from err
    except (SealError, KeyError, TypeError, ValueError) as err:
        raise damaged from err
    if len(kek) != DATA_KEY_BYTES:
        raise damaged
    return kek


def _read_private(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as err:
        raise KMSError(f"The key file {path} does not exist. Make one with 'strongroom seal --create-key'.") from err
    except OSError as err:
        raise KMSError(f"The key file {path} cannot be read: {err.strerror}.") from err
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0):
            raise KMSError(
                f"The key file {path} must be a regular file of this user that nobody else can read: chmod 600 {path}"
            )
        return file.read(_MAX_FILE_BYTES)


def _stretch(passphrase: str, salt: bytes, log2_n: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=1 << log2_n, r=8, p=1).derive(passphrase.encode())
