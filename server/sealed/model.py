"""Open a sealed model folder: every check that needs no key, in the order of the specification, section 6."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from server.errors import SealError
from server.sealed.format import (
    CORE_NAME,
    FILES_SHARD_NAME,
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_JSON_BYTES,
    MAX_SHARDS,
    RECIPIENTS_NAME,
    RECIPIENTS_TMP_NAME,
    SIGNATURE_NAME,
    Core,
    Kind,
    Manifest,
    Recipient,
    parse_core,
    parse_manifest,
    parse_recipients,
)
from server.sealed.shard import VerifiedShard, verify_shard
from server.sealed.signature import Statement, verify_bundle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from server.sealed.signature import TrustedSigner

_HASH_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A sealed model that passed every check that needs no key. `core_digest` is the model digest of audit records."""

    path: Path
    core: Core
    core_digest: bytes
    manifest: Manifest
    manifest_digest: bytes
    signer: str | None
    shards: tuple[VerifiedShard, ...]
    recipients: tuple[Recipient, ...]

    @property
    def weights(self) -> tuple[VerifiedShard, ...]:
        """The shards that hold tensors."""
        return tuple(s for s in self.shards if s.header.kind is Kind.WEIGHTS)

    @property
    def sealed_files(self) -> VerifiedShard | None:
        """The shard that holds config and tokenizer files, where they were sealed too."""
        return next((s for s in self.shards if s.header.kind is Kind.FILES), None)


def open_sealed(
    path: Path, *, trusted_signers: Sequence[TrustedSigner], floor: int = 1, allow_unsigned: bool = False
) -> SealedModel:
    """Check a sealed model without its key.

    Args:
        path: The sealed model's folder.
        trusted_signers: Whose signature counts.
        floor: The lowest version that may be opened.
        allow_unsigned: Go on without a signature by a trusted signer; `signer` is then None. The caller says so in the
            audit log and in the metrics.

    Raises:
        SealError: With the failing check, file and chunk in `detail`.
    """
    # 1.
    names = _list_folder(path)
    # 2.
    statement = _verify_signature(path, names, trusted_signers, allow_unsigned=allow_unsigned)
    # 3.
    core_bytes = _read_file(path / CORE_NAME, MAX_JSON_BYTES)
    manifest_bytes = _read_file(path / MANIFEST_NAME, MAX_JSON_BYTES)
    if statement is not None:
        for name, content in ((CORE_NAME, core_bytes), (MANIFEST_NAME, manifest_bytes)):
            if statement.digests.get(name) != hashlib.sha256(content).hexdigest():
                raise SealError(f"{name}: not what was signed", kind="signature")
    return _open(path, names, core_bytes, manifest_bytes, statement, floor)


def open_pinned(path: Path, *, manifest_sha256: str) -> SealedModel:
    """Check a sealed model that another process verified already, against the manifest digest that it handed on.

    Raises:
        SealError: As `open_sealed`; kind `signature` where anything changed since.
    """
    names = _list_folder(path)
    manifest_bytes = _read_file(path / MANIFEST_NAME, MAX_JSON_BYTES)
    if hashlib.sha256(manifest_bytes).hexdigest() != manifest_sha256:
        raise SealError(f"{MANIFEST_NAME}: replaced since it was verified", kind="signature")
    return _open(path, names, _read_file(path / CORE_NAME, MAX_JSON_BYTES), manifest_bytes, None, 1)


def verify_bytes(model: SealedModel, *, progress: object = None) -> None:
    """Hash every byte of every shard against the manifest; needs no key.

    Args:
        model: An opened model.
        progress: Called with the number of bytes hashed since the last call, or None.

    Raises:
        SealError: Kind `signature`, with the chunk where it can be told.
    """
    for shard in model.shards:
        digest = hashlib.sha256()
        with (model.path / shard.record.name).open("rb", buffering=0) as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
                if callable(progress):
                    progress(len(block))
        if digest.hexdigest() != shard.record.sha256:
            raise SealError(f"{shard.record.name}: its bytes are not what was signed", kind="signature")


def read_recipients(path: Path, core_digest: bytes) -> tuple[Recipient, ...]:
    """Read `recipients.json` and hold it against the core.

    Raises:
        SealError: Kind `header`.
    """
    core_sha256, recipients = parse_recipients(_read_file(path / RECIPIENTS_NAME, MAX_JSON_BYTES))
    if core_sha256 != core_digest.hex():
        raise SealError(f"{RECIPIENTS_NAME}: it belongs to another model, version or seal", kind="header")
    return recipients


def read_plain_file(model: SealedModel, name: str) -> bytes:
    """Read a config or tokenizer file and hold it against the manifest.

    Raises:
        SealError: Kind `signature`.
    """
    record = next(f for f in model.manifest.files if f.name == name)
    content = _read_file(model.path / name, MAX_FILE_BYTES)
    if len(content) != record.num_bytes or hashlib.sha256(content).hexdigest() != record.sha256:
        raise SealError(f"{name}: not what was signed", kind="signature")
    return content


def _open(
    path: Path, names: frozenset[str], core_bytes: bytes, manifest_bytes: bytes, statement: Statement | None, floor: int
) -> SealedModel:
    core = parse_core(core_bytes)
    manifest = parse_manifest(manifest_bytes)
    core_digest = hashlib.sha256(core_bytes).digest()
    # 4.
    if manifest.core_sha256 != core_digest.hex():
        raise SealError(f"{MANIFEST_NAME}: it belongs to another {CORE_NAME}", kind="signature")
    if statement is not None:
        _verify_same(statement, core, core_bytes, manifest, manifest_bytes)
    # 5.
    if core.version < floor:
        raise SealError(
            f"{CORE_NAME}: version {core.version} of {core.model_id} is below the floor {floor}", kind="version"
        )
    # 6.
    expected = {CORE_NAME, MANIFEST_NAME, RECIPIENTS_NAME}
    expected.update(s.name for s in manifest.shards)
    expected.update(f.name for f in manifest.files)
    for name in sorted(names - expected - {SIGNATURE_NAME, RECIPIENTS_TMP_NAME}):
        raise SealError(f"{name}: not part of the sealed model; remove it", kind="header")
    for name in sorted(expected - names):
        raise SealError(f"{name}: missing", kind="header")
    # 7.
    num_weights = sum(s.name != FILES_SHARD_NAME for s in manifest.shards)
    places = [(Kind.WEIGHTS, shard, num_weights) for shard in range(num_weights)] + [(Kind.FILES, 0, 1)]
    shards = tuple(
        verify_shard(path, record, core, core_digest, place=place)
        for record, place in zip(manifest.shards, places, strict=False)
    )
    model = SealedModel(
        path=path,
        core=core,
        core_digest=core_digest,
        manifest=manifest,
        manifest_digest=hashlib.sha256(manifest_bytes).digest(),
        signer=statement.signer if statement is not None else None,
        shards=shards,
        # 8.
        recipients=read_recipients(path, core_digest),
    )
    for record in manifest.files:
        read_plain_file(model, record.name)
    return model


def _list_folder(path: Path) -> frozenset[str]:
    try:
        with os.scandir(path) as entries:
            names = []
            for entry in entries:
                if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                    raise SealError(f"{entry.name}: not a regular file", kind="header")
                names.append(entry.name)
                if len(names) > MAX_FILES + MAX_SHARDS:
                    raise SealError("the folder holds too many files", kind="header")
    except OSError as err:
        raise SealError(f"{path}: not a readable folder: {err.strerror}", kind="header") from err
    return frozenset(names)


def _verify_signature(
    path: Path, names: frozenset[str], trusted: Sequence[TrustedSigner], *, allow_unsigned: bool
) -> Statement | None:
    if SIGNATURE_NAME not in names:
        if allow_unsigned:
            return None
        raise SealError(f"{SIGNATURE_NAME}: missing: the model is not signed", kind="signature")
    try:
        return verify_bundle(_read_file(path / SIGNATURE_NAME, 2 * MAX_JSON_BYTES), trusted=trusted)
    except SealError:
        if allow_unsigned:
            return None
        raise


def _verify_same(
    statement: Statement, core: Core, core_bytes: bytes, manifest: Manifest, manifest_bytes: bytes
) -> None:
    """What was signed and what the manifest lists must be the same files with the same digests."""
    if statement.model_name != core.model_id:
        raise SealError(f"{SIGNATURE_NAME}: signed for the model {statement.model_name!r}", kind="signature")
    listed = signed_digests(core_bytes, manifest, manifest_bytes)
    if listed != dict(statement.digests):
        differing = sorted(name for name, _ in listed.items() ^ dict(statement.digests).items())
        raise SealError(f"{MANIFEST_NAME}: {differing[0]}: signature and manifest disagree", kind="signature")


def signed_digests(core_bytes: bytes, manifest: Manifest, manifest_bytes: bytes) -> dict[str, str]:
    """Return the digests, by file name, that a signature covers."""
    digests = {s.name: s.sha256 for s in manifest.shards} | {f.name: f.sha256 for f in manifest.files}
    digests[CORE_NAME] = hashlib.sha256(core_bytes).hexdigest()
    digests[MANIFEST_NAME] = hashlib.sha256(manifest_bytes).hexdigest()
    return digests


def _read_file(path: Path, limit_bytes: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise SealError(f"{path.name}: cannot be read: {err.strerror}", kind="header") from err
    with os.fdopen(fd, "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise SealError(f"{path.name}: more than {limit_bytes} bytes", kind="header")
    return content
