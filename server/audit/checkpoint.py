"""Signed notes, checkpoints and their keys (C2SP signed-note, tlog-checkpoint, tlog-cosignature)."""

from __future__ import annotations

import base64
import binascii
import os
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from typing_extensions import override

from server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ED25519 = 0x01
COSIGNATURE_ED25519 = 0x04
MAX_NOTE_BYTES = 32_768
_SIGNATURE_MARK = "— "
_NAME = re.compile(r"[^\s+]{1,255}")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")


class NoteError(ValueError):
    """A signed note, key or checkpoint is malformed, or no trusted signature stands on it."""


def _decode_base64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise NoteError("Not standard base64.") from err
    if base64.b64encode(data).decode() != text:  # padding bits that hold something are a second spelling
        raise NoteError("Not canonical base64.")
    return data


def key_hash(name: str, key_type: int, public_key: bytes) -> bytes:
    """Return the 4-byte key id of signed-note."""
    return sha256(name.encode() + b"\n" + bytes([key_type]) + public_key).digest()[:4]


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key with its name: `name+hash+base64(type || key)`."""

    name: str
    key_type: int
    public_key: bytes

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read a vkey.

        Raises:
            NoteError: Malformed, an unknown type, or a hash that is not the key's.
        """
        parts = text.removesuffix("\n").split("+", 2)
        if len(parts) != 3 or _NAME.fullmatch(parts[0]) is None:
            raise NoteError("Not a verifier key: expected name+hash+base64.")
        material = _decode_base64(parts[2])
        if len(material) != 33 or material[0] not in (ED25519, COSIGNATURE_ED25519):
            raise NoteError("The verifier key is not an Ed25519 key of a known type.")
        key = cls(parts[0], material[0], material[1:])
        if key.id.hex() != parts[1]:
            raise NoteError("The verifier key's hash is not that of its name and key.")
        return key

    @property
    def id(self) -> bytes:
        """The 4 bytes that begin its signatures."""
        return key_hash(self.name, self.key_type, self.public_key)

    @override
    def __str__(self) -> str:
        material = base64.b64encode(bytes([self.key_type]) + self.public_key).decode()
        return f"{self.name}+{self.id.hex()}+{material}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree head: who, how large, which root."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """Return the note's text, final newline included."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read a note's text; extension lines are not accepted.

        Raises:
            NoteError: Malformed.
        """
        lines = text.split("\n")
        if len(lines) != 4 or lines[3] or not lines[0] or _DECIMAL.fullmatch(lines[1]) is None:
            raise NoteError("Not a checkpoint: expected origin, size and root on three lines.")
        root = _decode_base64(lines[2])
        if len(root) != 32:
            raise NoteError("The checkpoint's root is not 32 bytes.")
        return cls(lines[0], int(lines[1]), root)


def split_note(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    """Return a note's text and its signature lines as (key name, key id and signature).

    Raises:
        NoteError: Malformed.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise NoteError(f"The note is longer than {MAX_NOTE_BYTES} characters.")
    text, blank, rest = note.rpartition("\n\n")
    if not blank or not rest.endswith("\n"):
        raise NoteError("Not a signed note: no empty line before the signatures.")
    signatures = []
    for line in rest[:-1].split("\n"):
        name, space, encoded = line.removeprefix(_SIGNATURE_MARK).partition(" ")
        if not line.startswith(_SIGNATURE_MARK) or not space or _NAME.fullmatch(name) is None:
            raise NoteError("Not a signed note: a signature line is malformed.")
        data = _decode_base64(encoded)
        if len(data) < 5:
            raise NoteError("Not a signed note: a signature is too short.")
        signatures.append((name, data))
    return text + "\n", signatures


@lru_cache(maxsize=32)
def _load_public_key(data: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(data)


def verify_note(note: str, key: VerifierKey) -> str:
    """Return the note's text if `key` signed it.

    Raises:
        NoteError: Malformed, not signed by this key, or a wrong signature.
    """
    text, signatures = split_note(note)
    mine = [data for name, data in signatures if name == key.name and data[:4] == key.id]
    if len(mine) != 1:
        raise NoteError(f"The note has {len(mine)} signatures of {key.name} (key {key.id.hex()}); expected one.")
    signature, message = mine[0][4:], text.encode()
    if key.key_type == COSIGNATURE_ED25519:
        if len(signature) != 72:
            raise NoteError("The cosignature has a wrong length.")
        (time_s,) = struct.unpack(">Q", signature[:8])
        signature, message = signature[8:], f"cosignature/v1\ntime {time_s}\n".encode() + message
    try:
        _load_public_key(key.public_key).verify(signature, message)
    except InvalidSignature as err:
        raise NoteError(f"The signature of {key.name} is wrong.") from err
    return text


def verify_checkpoint(note: str, key: VerifierKey) -> Checkpoint:
    """Return the checkpoint if `key` signed it and, for a log's key, its origin is the key's name.

    Raises:
        NoteError: Malformed, another origin, not signed by this key, or a wrong signature.
    """
    checkpoint = Checkpoint.parse(verify_note(note, key))
    if key.key_type == ED25519 and checkpoint.origin != key.name:
        raise NoteError(f"The checkpoint is of {checkpoint.origin}, not of {key.name}.")
    return checkpoint


def signature_line(name: str, key_id: bytes, signature: bytes) -> str:
    """Return one signature line of a note."""
    return f"{_SIGNATURE_MARK}{name} {base64.b64encode(key_id + signature).decode()}\n"


class Signer(Protocol):
    """Whoever holds the log's private key: a file here, or a token."""

    @property
    def key(self) -> VerifierKey:
        """The public key."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`.

        Raises:
            OSError: The key can't be used now; the log stops until it can.
        """
        ...


class FileSigner:
    """A private key in memory, read from a file."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey, *, key_type: int = ED25519) -> None:
        self._private_key = private_key
        public = private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self._key = VerifierKey(name, key_type, public)

    @property
    def key(self) -> VerifierKey:
        """The public key."""
        return self._key

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`."""
        return self._private_key.sign(message)


class CheckpointSigner:
    """Makes signed checkpoints of one origin, fast: everything constant is encoded once."""

    def __init__(self, signer: Signer) -> None:
        self._sign = signer.sign
        self.key = signer.key
        self._id = signer.key.id
        self._head = f"{signer.key.name}\n".encode()
        self._line = f"\n{_SIGNATURE_MARK}{signer.key.name} ".encode()

    def note(self, size: int, root: bytes) -> bytes:
        """Return the signed checkpoint of a tree."""
        text = b"%b%d\n%b" % (self._head, size, binascii.b2a_base64(root))
        return text + self._line + binascii.b2a_base64(self._id + self._sign(text))


def cosign(note_text: str, signer: Signer, time_s: int) -> str:
    """Return the cosignature line of a witness over a checkpoint's text (tlog-cosignature, Ed25519)."""
    signature = signer.sign(f"cosignature/v1\ntime {time_s}\n{note_text}".encode())
    return signature_line(signer.key.name, signer.key.id, struct.pack(">Q", time_s) + signature)


def check_key_name(name: str) -> None:
    """Refuse a name that a note can't bear.

    Raises:
        ConfigError: It has spaces or a plus.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"'{name}' can't name an audit key; use a name without spaces or '+', like example.com/audit."
        )


def new_audit_key(path: Path, *, name: str, key_type: int = ED25519) -> VerifierKey:
    """Draw an Ed25519 key and write it to `path` (0600), with its public vkey beside it as `<path>.vkey`.

    Args:
        path: Where the private key goes; must not exist.
        name: The log's origin, or the witness's name: no spaces, no plus.
        key_type: `ED25519` for a log, `COSIGNATURE_ED25519` for a witness.

    Raises:
        ConfigError: The file exists, cannot be written, or the name is not allowed.
    """
    check_key_name(name)
    private_key = Ed25519PrivateKey.generate()
    pem = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key = FileSigner(name, private_key, key_type=key_type).key
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        path.with_name(path.name + ".vkey").write_text(f"{key}\n")
    except OSError as err:
        raise ConfigError(f"The audit key {path} could not be written: {err.strerror}.") from err
    return key


def load_audit_key(path: Path) -> FileSigner:
    """Read a private key and the name that stands in the vkey beside it.

    Raises:
        ConfigError: Missing, readable by others, or the two files do not belong together.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read(65_536)
        key = VerifierKey.parse(path.with_name(path.name + ".vkey").read_text())
        private_key = load_pem_private_key(pem, None)
    except (OSError, ValueError) as err:
        raise ConfigError(f"The audit key {path} or its .vkey can't be read: {type(err).__name__}.") from err
    if mode & 0o077:
        raise ConfigError(f"The audit key {path} may be read by others; run: chmod 600 {path}")
    if not isinstance(private_key, Ed25519PrivateKey):
        raise ConfigError(f"The audit key {path} is not an Ed25519 key.")
    signer = FileSigner(key.name, private_key, key_type=key.key_type)
    if signer.key != key:
        raise ConfigError(f"The audit key {path} does not belong to the .vkey beside it.")
    return signer
