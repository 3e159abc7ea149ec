"""Seal a model: stream it into a new folder that appears only when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.sealed.envelope import key_check, wrap_for_all
from server.sealed.format import (
    CORE_NAME,
    DEFAULT_CHUNK_BYTES,
    FILES_SHARD_NAME,
    MANIFEST_NAME,
    RECIPIENTS_NAME,
    SIGNATURE_NAME,
    Core,
    FileRecord,
    Kind,
    Manifest,
    Suite,
    marshal_core,
    marshal_manifest,
    marshal_recipients,
    parse_core,
    parse_manifest,
    shard_name,
)
from server.sealed.kms.base import DATA_KEY_BYTES, DataKey, KeyContext
from server.sealed.memory import forbid_core_dumps
from server.sealed.model import signed_digests
from server.sealed.shard import write_shard
from server.sealed.signature import sign_resources
from server.sealed.source import Source, describe, file_shard, load_source

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from server.sealed.kms.base import KMS
    from server.sealed.signature import Signer


def seal_model(
    source: Path | Source,
    out_dir: Path,
    *,
    model_id: str,
    version: int,
    services: Sequence[KMS],
    signer: Signer | None,
    suite: Suite = Suite.AES_256_GCM,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    seal_files: bool = False,
    lineage: Mapping[str, str] | None = None,
    licence: str = "",
    progress: Callable[[int], None] = lambda _: None,
    entropy: Callable[[int], bytes] = secrets.token_bytes,
) -> Core:
    """Seal a model into the new folder `out_dir`; constant memory, and atomic: until the last step there is no folder.

    Args:
        source: A model folder, or tensors in memory (`server.sealed.source.prepare`).
        out_dir: Must not exist; its parent must, on the disk where the model is to live.
        model_id: Lower-case name that key services and policy know it by.
        version: At least 1; higher than every earlier one of this model.
        services: The key services that may open it; each wraps the same new data key.
        signer: Who signs; None leaves the model unsigned, and then it starts only where the config allows that.
        suite: The AEAD.
        chunk_bytes: Plaintext a chunk.
        seal_files: Seal config and tokenizer too.
        lineage: Where the model came from, in the operator's words.
        licence: SPDX expression.
        progress: Called with the number of plaintext bytes sealed since the last call.
        entropy: Source of random bytes; only vectors fix it.

    Raises:
        ConfigError: The source or an argument is not acceptable.
        KMSError: A key service did not wrap the key.
    """
    forbid_core_dumps()  # from here on this process holds a data key and plaintext
    if not services:
        raise ConfigError("A model is sealed for at least one key service: pass --kms URI.")
    source = source if isinstance(source, Source) else load_source(source)
    dtype, quantization = describe(source)
    core_bytes = marshal_core(
        Core(model_id, version, entropy(16).hex(), suite, chunk_bytes, dtype=dtype, quantization=quantization)
    )
    core = _checked_core(core_bytes)
    core_digest = hashlib.sha256(core_bytes).digest()
    with _new_folder(out_dir) as folder, DataKey(entropy(DATA_KEY_BYTES)) as data_key:
        # The key services first: a refusal comes before gigabytes are read.
        recipients = wrap_for_all(data_key, services, KeyContext.of(core))
        weights = list(source.shards)
        jobs = [(shard_name(i, len(weights)), s, Kind.WEIGHTS, i, len(weights)) for i, s in enumerate(weights)]
        if seal_files:
            jobs.append((FILES_SHARD_NAME, file_shard(source.files), Kind.FILES, 0, 1))
        shards = tuple(
            write_shard(
                folder / name,
                shard_source,
                kind=kind,
                shard=shard,
                num_shards=num_shards,
                core=core,
                core_digest=core_digest,
                data_key=data_key.reveal(),
                progress=progress,
            )
            for name, shard_source, kind, shard, num_shards in jobs
        )
        plain = {} if seal_files else dict(sorted(source.files.items()))
        manifest = Manifest(
            core_sha256=core_digest.hex(),
            key_check=key_check(data_key, core_digest).hex(),
            shards=shards,
            files=tuple(FileRecord(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in plain.items()),
            lineage=dict(lineage or {}),
            licence=licence,
        )
        manifest_bytes = marshal_manifest(manifest)
        parse_manifest(manifest_bytes)  # never write what a reader refuses
        contents = dict(plain)
        contents[CORE_NAME] = core_bytes
        contents[MANIFEST_NAME] = manifest_bytes
        contents[RECIPIENTS_NAME] = marshal_recipients(core_digest.hex(), recipients)
        if signer is not None:
            digests = signed_digests(core_bytes, manifest, manifest_bytes)
            contents[SIGNATURE_NAME] = sign_resources(digests, model_name=model_id, signer=signer)
        for name, content in contents.items():
            write_durably(folder / name, content)
    return core


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and fsync it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make the folder's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _checked_core(core_bytes: bytes) -> Core:
    from server.errors import SealError

    try:
        return parse_core(core_bytes)
    except SealError as err:
        raise ConfigError(f"The model cannot be sealed like this: {err.detail}.") from err


@contextlib.contextmanager
def _new_folder(out_dir: Path) -> Generator[Path]:
    """A hidden folder beside `out_dir` that takes its name at the end; what a killed run left is cleared first."""
    if out_dir.exists():
        raise ConfigError(f"{out_dir} exists already; a sealed model is never overwritten. Choose another folder.")
    parent = out_dir.resolve().parent
    working = parent / f".{out_dir.name}.sealing"
    try:
        lock = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise ConfigError(f"The folder {parent} cannot be used: {err.strerror}. Make it first.") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if working.exists():
            shutil.rmtree(working)
        working.mkdir(mode=0o700)
        yield working
        fsync_folder(working)
        working.rename(out_dir)
        fsync_folder(parent)
    except BlockingIOError as err:
        raise ConfigError(f"Another seal is writing into {parent}. Wait for it to end.") from err
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    finally:
        os.close(lock)
