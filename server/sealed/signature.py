"""Sign and verify a sealed model as OpenSSF model-signing v1.0 does (Sigstore bundle, DSSE, in-toto, ECDSA key).

The package `model-signing` brings a Sigstore and a TUF client along (12 packages) for what is one ECDSA signature here;
its verifier accepts what this file writes, and a test holds that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from server.errors import ConfigError, SealError
from server.sealed.format import (
    MAX_JSON_BYTES,
    RECIPIENTS_NAME,
    RECIPIENTS_TMP_NAME,
    SIGNATURE_NAME,
    canonical_json,
    parse_canonical,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
_SERIALIZATION: Final[dict[str, Any]] = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [SIGNATURE_NAME, RECIPIENTS_NAME, RECIPIENTS_TMP_NAME],
}
_HASHES: Final[dict[str, type[HashAlgorithm]]] = {"secp256r1": SHA256, "secp384r1": SHA384, "secp521r1": SHA512}


@dataclass(frozen=True, slots=True)
class TrustedSigner:
    """A public key whose signatures count. `id` is the digest of its PEM form, as the bundle's hint."""

    id: str
    public_key: ec.EllipticCurvePublicKey

    @classmethod
    def of(cls, public_key: ec.EllipticCurvePublicKey) -> Self:
        """Return the signer of a public key."""
        return cls(hashlib.sha256(_pem(public_key)).hexdigest(), public_key)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a PEM public key.

        Raises:
            ConfigError: Missing, not PEM, or not on P-256, P-384 or P-521.
        """
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError) as err:
            raise ConfigError(f"The trusted signer {path} is not a readable PEM public key.") from err
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
            raise ConfigError(f"The trusted signer {path} must be an ECDSA key on P-256, P-384 or P-521.")
        return cls.of(key)


class Signer(Protocol):
    """Whoever holds a private key for signing models."""

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return the DER ECDSA signature over `message`, hashed as the curve demands."""
        ...


class LocalSigner:
    """A private key from a PEM file."""

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        self._private_key = private_key
        self.public_key = private_key.public_key()

    @classmethod
    def load(cls, path: Path, *, passphrase: bytes | None = None) -> Self:
        """Read a PEM private key that nobody else can read.

        Raises:
            ConfigError: Missing, readable by others, not PEM, or of another kind.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise ConfigError(f"The signing key {path} can be read by others: chmod 600 {path}")
                key = serialization.load_pem_private_key(file.read(65536), passphrase)
        except (OSError, ValueError, TypeError) as err:
            raise ConfigError(f"The signing key {path} is not a readable PEM private key.") from err
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
            raise ConfigError(f"The signing key {path} must be an ECDSA key on P-256, P-384 or P-521.")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """Return the DER ECDSA signature over `message`."""
        # RFC 6979: a nonce that repeats or leaks would give the key away; derived ones can't.
        return self._private_key.sign(message, ec.ECDSA(hash_for(self.public_key), deterministic_signing=True))


def create_signing_key(path: Path) -> TrustedSigner:
    """Write a new P-256 private key to `path` (0600) and its public half to `path` with `.pub` added; never overwrites.

    Raises:
        ConfigError: The file exists or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        for target, content, mode in ((path, pem, 0o600), (public_path(path), _pem(key.public_key()), 0o644)):
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError as err:
        raise ConfigError(f"The signing key {path} cannot be written: {err.strerror}.") from err
    return TrustedSigner.of(key.public_key())


def public_path(path: Path) -> Path:
    """Return where `create_signing_key` puts the public half."""
    return path.with_name(path.name + ".pub")


def sign_resources(resources: Mapping[str, str], *, model_name: str, signer: Signer) -> bytes:
    """Return `model.sig` over file names and their SHA-256 digests (hex)."""
    statement = canonical_json(_statement(resources, model_name))
    signature = signer.sign(_pre_authentication(statement))
    return canonical_json(
        {
            "mediaType": _BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": TrustedSigner.of(signer.public_key).id},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(statement).decode(),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


@dataclass(frozen=True, slots=True)
class Statement:
    """What `model.sig` says: who signed, which model, and the SHA-256 (hex) of every file by name."""

    signer: str
    model_name: str
    digests: Mapping[str, str]


def verify_bundle(bundle: bytes, *, trusted: Sequence[TrustedSigner]) -> Statement:
    """Verify `model.sig` and return what it says.

    Raises:
        SealError: Kind `signature`.
    """
    payload, signature, hint = _parse_bundle(bundle)
    signer = next((s for s in trusted if s.id == hint), None)
    if signer is None:
        raise SealError(f"{SIGNATURE_NAME}: signed by {hint}, who is no trusted signer", kind="signature")
    try:
        signer.public_key.verify(signature, _pre_authentication(payload), ec.ECDSA(hash_for(signer.public_key)))
    except InvalidSignature as err:
        raise SealError(f"{SIGNATURE_NAME}: the signature of {hint} does not verify", kind="signature") from err
    return _parse_statement(payload, signer.id)


def parse_unverified(bundle: bytes) -> Statement:
    """Return what a bundle claims, without believing it: for `inspect` and for models allowed unsigned.

    Raises:
        SealError: It is malformed; kind `signature`.
    """
    payload, _, hint = _parse_bundle(bundle)
    return _parse_statement(payload, hint)


def hash_for(public_key: ec.EllipticCurvePublicKey) -> HashAlgorithm:
    """Return the hash that goes with the key's curve."""
    return _HASHES[public_key.curve.name]()


def _statement(resources: Mapping[str, str], model_name: str) -> dict[str, Any]:
    ordered = sorted(resources.items())
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered)).hexdigest()
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": model_name, "digest": {"sha256": root}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": _SERIALIZATION,
            "resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in ordered],
        },
    }


def _parse_bundle(bundle: bytes) -> tuple[bytes, bytes, str]:
    try:
        fields = parse_canonical(bundle, SIGNATURE_NAME, limit_bytes=2 * MAX_JSON_BYTES)
        envelope = fields["dsseEnvelope"]
        hint = fields["verificationMaterial"]["publicKey"]["hint"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        expected = {
            "mediaType": _BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    except (SealError, KeyError, IndexError, TypeError, binascii.Error, ValueError) as err:
        raise SealError(f"{SIGNATURE_NAME}: not a bundle of this format", kind="signature") from err
    if fields != expected or not isinstance(hint, str):
        raise SealError(f"{SIGNATURE_NAME}: not exactly the bundle that this format has", kind="signature")
    return payload, signature, hint


def _parse_statement(payload: bytes, signer: str) -> Statement:
    try:
        statement = json.loads(payload)
        name = statement["subject"][0]["name"]
        digests = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
        expected = canonical_json(_statement(digests, name))
    except (LookupError, TypeError, ValueError, RecursionError) as err:
        raise SealError(f"{SIGNATURE_NAME}: the signed statement is malformed", kind="signature") from err
    # Rebuilding the whole statement refuses repeated names, other algorithms and surplus fields at once.
    if expected != payload:
        raise SealError(f"{SIGNATURE_NAME}: not a statement of this format", kind="signature")
    return Statement(signer, name, digests)


def _pre_authentication(payload: bytes) -> bytes:
    """DSSE v1 PAE."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _pem(public_key: ec.EllipticCurvePublicKey) -> bytes:
    return public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
