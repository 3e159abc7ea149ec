"""Wrap and unwrap the data key for the recipients of a sealed model."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from server.errors import KMSError, SealError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.sealed.format import Recipient
    from server.sealed.kms.base import KMS, DataKey, KeyContext

_CHECK_LABEL: Final = b"strongroom/v1/key-check"


def key_check(data_key: DataKey, core_digest: bytes) -> bytes:
    """Return the 32 bytes that commit to the data key; they reveal nothing of it."""
    return HKDF(algorithm=SHA256(), length=32, salt=core_digest, info=_CHECK_LABEL).derive(bytes(data_key.reveal()))


def wrap_for_all(data_key: DataKey, services: Sequence[KMS], context: KeyContext) -> tuple[Recipient, ...]:
    """Wrap one data key for every service.

    Raises:
        KMSError: Any of them failed; a model is sealed for all that were asked for or not at all.
    """
    return tuple(service.wrap(data_key, context) for service in services)


def unwrap_from_any(recipients: Sequence[Recipient], services: Sequence[KMS], context: KeyContext) -> DataKey:
    """Open the data key with the first configured service that knows one of the recipients.

    Only services of the caller's configuration are asked: the recipients are not signed, and whoever could write them
    must not choose whom this process talks to.

    Raises:
        SealError: The model is sealed for none of these services; kind `key`.
        KMSError: Every service that knows a recipient failed; the last one's reason.
    """
    failure: KMSError | None = None
    for service in services:
        for recipient in recipients:
            if (recipient.kms, recipient.key_id) != (service.mechanism, service.key_id):
                continue
            try:
                return service.unwrap(recipient, context)
            except KMSError as err:
                failure = err
    if failure is not None:
        raise failure
    have = ", ".join(sorted({f"{r.kms}:{r.key_id}" for r in recipients}))
    asked = ", ".join(f"{s.mechanism}:{s.key_id}" for s in services) or "none"
    raise SealError(f"recipients.json: sealed for {have}; configured key services: {asked}", kind="key")


def verify_key_check(data_key: DataKey, core_digest: bytes, expected_sha256: str) -> None:
    """Raise unless this is the data key that the model was sealed with.

    Raises:
        SealError: Another key, for instance another model's; kind `key`.
    """
    if not hmac.compare_digest(key_check(data_key, core_digest).hex(), expected_sha256):
        raise SealError("manifest.json: key_check: the released key is not this model's", kind="key")
