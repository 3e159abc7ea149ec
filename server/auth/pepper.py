"""The server's secrets under which keys are stored and tenants salted: their file form, their checks."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from typing import TYPE_CHECKING

from typing_extensions import override

from server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from server.types import TenantId

MIN_SECRET_BYTES = 32
MAX_FILE_BYTES = 64 * 1024


class Pepper:
    """The secrets under which API keys are stored, by number; the highest is used for new keys.

    Args:
        secrets_by_number: At least one secret of at least 32 bytes.

    Raises:
        ConfigError: None is there, or one is weak.
    """

    __slots__ = ("_secrets", "current")

    def __init__(self, secrets_by_number: dict[int, bytes]) -> None:
        if not secrets_by_number:
            raise ConfigError("The pepper is empty; make one with 'strongroom keys init'.")
        for number, secret in secrets_by_number.items():
            check_secret(secret, f"pepper {number}")
        self._secrets = dict(secrets_by_number)
        self.current = max(secrets_by_number)

    @override
    def __repr__(self) -> str:
        return f"Pepper(numbers={sorted(self._secrets)})"

    @property
    def numbers(self) -> list[int]:
        """The numbers of all peppers, newest first."""
        return sorted(self._secrets, reverse=True)

    def digest(self, key: str, number: int) -> bytes:
        """Return HMAC-SHA-256 of `key` under pepper `number`; a number we lack gives the digest under no known key."""
        secret = self._secrets.get(number)
        if secret is None:
            secret = secrets.token_bytes(MIN_SECRET_BYTES)
        return hmac.digest(secret, key.encode(), "sha256")


class CacheSalt:
    """Salts of the engine's prefix cache, one a tenant: one tenant can't time another's prompts.

    Args:
        secret: At least 32 bytes; a new one empties every tenant's cache.

    Raises:
        ConfigError: The secret is weak.
    """

    __slots__ = ("_known", "_secret")

    def __init__(self, secret: bytes) -> None:
        check_secret(secret, "salt secret")
        self._secret = secret
        self._known: dict[str, str] = {}

    def cache_salt(self, tenant: TenantId) -> str:
        """Return the tenant's salt: 32 hex digits that tell nothing of its name."""
        salt = self._known.get(tenant)
        if salt is None:
            salt = hmac.digest(self._secret, b"cache-salt\0" + tenant.encode(), "sha256").hex()[:32]
            if len(self._known) >= 65536:  # tenants come from tokens: the memory for them is bounded
                self._known.clear()
            self._known[tenant] = salt
        return salt


def check_secret(secret: bytes, name: str) -> None:
    """Refuse a secret that was not drawn at random.

    Raises:
        ConfigError: It is shorter than 32 bytes, or has far fewer different bytes than chance gives.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"The {name} has {len(secret)} bytes and needs at least {MIN_SECRET_BYTES} random ones; "
            "make one with 'strongroom keys init'."
        )
    # 32 random bytes have 30 different values on average and fewer than 20 once in 10^13 draws; words and
    # 'changeme' repeated have fewer.
    if len(set(secret)) < 20:
        raise ConfigError(f"The {name} is not random; make one with 'strongroom keys init'.")


def load_pepper(path: Path) -> Pepper:
    """Read a pepper file: one line a pepper, `<number> <hex>`.

    Raises:
        ConfigError: The file is missing, readable by others, or not of this form.
    """
    found: dict[int, bytes] = {}
    for line in _read_private(path, "pepper").decode("ascii", errors="replace").splitlines():
        number, _, digits = line.partition(" ")
        try:
            value = bytes.fromhex(digits)
        except ValueError:
            value = b""
        if not number.isascii() or not number.isdigit() or not value or int(number) in found:
            raise ConfigError(f"The pepper file {path} is damaged; every line must be '<number> <hex digits>'.")
        found[int(number)] = value
    return Pepper(found)


def load_secret(path: Path, name: str) -> bytes:
    """Read a file that holds one secret in hex.

    Raises:
        ConfigError: The file is missing, readable by others, not hex, or weak.
    """
    text = _read_private(path, name).decode("ascii", errors="replace").strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError(f"The file {path} must hold the {name} as hex digits.") from error
    check_secret(secret, name)
    return secret


def new_pepper(path: Path, *, number: int = 1) -> None:
    """Write a first pepper file, mode 0600; one that is there stays as it is."""
    _write_private(path, f"{number} {secrets.token_hex(MIN_SECRET_BYTES)}\n")


def new_secret(path: Path) -> None:
    """Write a fresh secret in hex, mode 0600; one that is there stays as it is."""
    _write_private(path, secrets.token_hex(MIN_SECRET_BYTES) + "\n")


def rotate_pepper(path: Path) -> int:
    """Add a pepper for new keys and return its number; keys under the older ones stay valid until they are rotated.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    number = load_pepper(path).current + 1
    text = path.read_text(encoding="ascii") + f"{number} {secrets.token_hex(MIN_SECRET_BYTES)}\n"
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _write_private(fresh, text)
    fresh.replace(path)
    return number


def fingerprint(secret: bytes) -> str:
    """Return eight hex digits by which an operator tells two secrets apart."""
    return hashlib.sha256(b"strongroom fingerprint\0" + secret).hexdigest()[:8]


def _read_private(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"The {name} file {path} can't be read ({error.strerror}).") from error
    if mode & 0o077:
        raise ConfigError(f"The {name} file {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"The {name} file {path} is larger than {MAX_FILE_BYTES} bytes.")
    return content


def _write_private(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
