"""What a key service must do, the same for every backend; what they share besides."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from typing_extensions import override

from server.errors import KMSDeniedError, KMSUnreachableError
from server.sealed.format import TAG_BYTES, canonical_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.sealed.format import Core, Recipient

DATA_KEY_BYTES: Final = 32
Bytes = bytes | bytearray | memoryview
_WRAP_LABEL: Final = b"strongroom/v1/wrap"
_Result = TypeVar("_Result")


class DataKey:
    """A 32-byte secret that is zeroed on `close`; never printed.

    Args:
        value: The key; copied, so that the caller can wipe its own.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Bytes) -> None:
        self._value = bytearray(value)
        if len(self._value) != DATA_KEY_BYTES:
            raise KMSDeniedError(f"The key service returned {len(self._value)} bytes, expected {DATA_KEY_BYTES}.")

    def reveal(self) -> bytearray:
        """Return the key itself, not a copy; the caller keeps it out of logs, errors and records."""
        return self._value

    def close(self) -> None:
        """Zero the key; it opens nothing any more."""
        self._value[:] = bytes(len(self._value))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @override
    def __repr__(self) -> str:
        return "DataKey(<redacted>)"


@dataclass(frozen=True, slots=True)
class KeyContext:
    """What a wrapped data key is bound to; a key service can decide on each part and logs all of it."""

    model_id: str
    version: int
    seal_id: str
    purpose: str = "weights"

    @classmethod
    def of(cls, core: Core) -> Self:
        """Return the context of a sealed model."""
        return cls(core.model_id, core.version, core.seal_id)

    def as_dict(self) -> dict[str, str]:
        """Return the context as strings, the form that key services take."""
        return {
            "model_id": self.model_id,
            "purpose": self.purpose,
            "seal_id": self.seal_id,
            "version": str(self.version),
        }

    def canonical(self) -> bytes:
        """Return the context as bytes, for associated data."""
        return canonical_json(dict(self.as_dict()))


class KMS(Protocol):
    """One key of one key service."""

    @property
    def mechanism(self) -> str:
        """The name that recipients of this backend carry (`file`, `openbao`, …)."""
        ...

    @property
    def key_id(self) -> str:
        """Which key of the service; holds no address and no secret."""
        ...

    def wrap(self, data_key: DataKey, context: KeyContext) -> Recipient:
        """Wrap `data_key`, bound to `context`.

        Raises:
            KMSError: With the subclass that says why.
        """
        ...

    def unwrap(self, recipient: Recipient, context: KeyContext) -> DataKey:
        """Open what `wrap` made under the same context.

        Raises:
            KMSDeniedError: Refused: policy, wrong context or wrong key.
            KMSDisabledError: The key is disabled, revoked or destroyed.
            KMSUnreachableError: No answer in time, retries included.
        """
        ...


def bind_to_context(secret: Bytes, data_key: DataKey, context: KeyContext) -> bytes:
    """Wrap `data_key` under a mechanism's one-time `secret`, for mechanisms that take no context themselves."""
    # The nonce is fixed: `secret` is drawn for this one wrap, so this key seals once.
    return AESGCM(_context_key(secret, context)).encrypt(bytes(12), bytes(data_key.reveal()), None)


def unbind_from_context(secret: Bytes, bound: bytes, context: KeyContext) -> DataKey:
    """Open what `bind_to_context` made.

    Raises:
        KMSDeniedError: Another context, or damage.
    """
    if len(bound) != DATA_KEY_BYTES + TAG_BYTES:
        raise wrong_key("the wrapped key has the wrong size")
    try:
        return DataKey(AESGCM(_context_key(secret, context)).decrypt(bytes(12), bound, None))
    except InvalidTag as err:
        raise wrong_key("wrong context or a damaged wrapped key") from err


def _context_key(secret: Bytes, context: KeyContext) -> bytes:
    info = _WRAP_LABEL + context.canonical()
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(bytes(secret))


def wrong_key(reason: str) -> KMSDeniedError:
    """Return the error for a wrapped key that does not open: wrong key, wrong context or damage."""
    return KMSDeniedError(
        f"The wrapped data key does not open: {reason}. Check that the model was sealed for this key and not altered."
    )


def call_with_retries(
    call: Callable[[], _Result],
    *,
    attempts: int = 4,
    first_delay_s: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> _Result:
    """Call until it answers; only `KMSUnreachableError` is tried again, with full jitter and doubling delays.

    Raises:
        KMSUnreachableError: Every attempt failed.
    """
    for attempt in range(attempts - 1):
        try:
            return call()
        except KMSUnreachableError:
            # Full jitter: a whole fleet that restarts together must not knock the key service over again.
            sleep(first_delay_s * 2**attempt * secrets.randbelow(1000) / 1000)
    return call()
