"""A key, a signer and small sealed models for the tests of this room."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric import ec

from server.sealed.agent import KeyAgent
from server.sealed.format import Suite
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.seal import seal_model
from server.sealed.shard import ShardReader
from server.sealed.signature import LocalSigner, TrustedSigner
from server.sealed.source import MemoryShard, Source, Tensor, prepare

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

CHUNK_BYTES = 1 << 16


def pattern(name: str, num_bytes: int) -> bytes:
    """Bytes that differ for every name and everywhere."""
    return hashlib.shake_256(name.encode()).digest(num_bytes)


def tensor(name: str, shape: tuple[int, ...], dtype: str = "BF16", item_bytes: int = 2) -> Tensor:
    num_bytes = item_bytes
    for size in shape:
        num_bytes *= size
    return Tensor(name, dtype, shape, memoryview(pattern(name, num_bytes)))


def small_source() -> Source:
    """Two shards: one tensor over chunks, one of exactly a chunk, a scalar, an empty one."""
    first = MemoryShard([tensor("embed", (300, 256)), tensor("norm", (256,)), tensor("exact", (128, 256))])
    second = MemoryShard([tensor("layer.0", (64, 64)), tensor("scalar", ()), tensor("empty", (0, 4))])
    files = {
        "config.json": json.dumps({"model_type": "tiny", "dtype": "bfloat16"}).encode(),
        "tokenizer.json": b'{"vocab":{}}',
    }
    return prepare([first, second], files)


@dataclass
class Workshop:
    """A key, a signer, and a place to seal into."""

    folder: Path
    kms: LocalKMS
    signer: LocalSigner

    @property
    def trusted(self) -> list[TrustedSigner]:
        return [TrustedSigner.of(self.signer.public_key)]

    def seal(self, name: str = "model", **changes) -> Path:
        out = self.folder / name
        options: dict[str, Any] = {
            "model_id": "tiny",
            "version": 1,
            "services": [self.kms],
            "signer": self.signer,
            "suite": Suite.AES_256_GCM,
            "chunk_bytes": CHUNK_BYTES,
        } | changes
        seal_model(options.pop("source", None) or small_source(), out, **options)
        return out


def open_workshop(folder: Path) -> Workshop:
    key = folder / "kms.key"
    create_key_file(key)
    return Workshop(folder, LocalKMS(key), LocalSigner(ec.generate_private_key(ec.SECP256R1())))


def load(path: Path, workshop: Workshop, *, pool: ThreadPoolExecutor | None = None) -> dict[str, bytes]:
    """Open a sealed model as the key agent and the loader do, and return its tensors."""
    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda _tag, **_fields: None)
    release = agent.release(path)
    tensors = {}
    with release.data_key as data_key:
        for shard in release.model.weights:
            with ShardReader(path, shard, release.model.core, data_key.reveal(), pool=pool) as reader:
                for entry in reader.index.entries:
                    buffer = bytearray(entry.num_bytes)
                    reader.read_into(entry.name, memoryview(buffer))
                    tensors[entry.name] = bytes(buffer)
    return tensors


def plaintext(source: Source) -> dict[str, bytes]:
    """Return what `load` must give."""
    tensors = {}
    for shard in source.shards:
        for position, entry in enumerate(shard.index.entries):
            buffer = bytearray(entry.num_bytes)
            shard.read_into(position, 0, memoryview(buffer))
            tensors[entry.name] = bytes(buffer)
    return tensors
