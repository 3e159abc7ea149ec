"""Make the vectors again: `python -m tests.vectors.sealed.generate`; the same bytes come out every time."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.sealed.format import HEADER_BYTES, Suite, parse_header
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner
from server.sealed.source import MemoryShard, Source, Tensor, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
CHUNK_BYTES = 1 << 16
SIGNED = ("manifest.json", "model.sig")
FIRST, SECOND = "model-00001-of-00002.sealed", "model-00002-of-00002.sealed"
SIGNING_SECRET = int.from_bytes(hashlib.sha256(b"strongroom vectors: signer").digest(), "big")


def entropy(label: str) -> Callable[[int], bytes]:
    """Bytes that depend on the label only."""
    stream = hashlib.shake_256(b"strongroom vectors: " + label.encode()).digest(4096)
    position = 0

    def draw(num_bytes: int) -> bytes:
        nonlocal position
        position += num_bytes
        return stream[position - num_bytes : position]

    return draw


def tensor(name: str, dtype: str, shape: tuple[int, ...], num_bytes: int) -> Tensor:
    return Tensor(name, dtype, shape, memoryview(hashlib.shake_256(name.encode()).digest(num_bytes)))


def source() -> Source:
    first = MemoryShard([tensor("embed.weight", "BF16", (150, 256), 76800), tensor("norm.weight", "F32", (64,), 256)])
    second = MemoryShard([tensor("head.weight", "I8", (1000,), 1000), tensor("scale", "F16", (), 2)])
    return prepare([first, second], {"config.json": b'{"dtype": "bfloat16", "model_type": "tiny"}'})


def bases(folder: Path) -> None:
    key = folder / "kms.key"
    create_key_file(key)
    content = json.loads(key.read_bytes())
    content["key"] = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    key.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")))
    private_key = ec.derive_private_key(SIGNING_SECRET, ec.SECP256R1())
    (folder / "signer.pub").write_bytes(
        private_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    for name, model_id, version, suite in (
        ("gcm", "tiny", 2, Suite.AES_256_GCM),
        ("gcm-v1", "tiny", 1, Suite.AES_256_GCM),
        ("chacha", "tiny", 2, Suite.CHACHA20_POLY1305),
        ("other", "other", 2, Suite.AES_256_GCM),
    ):
        seal_model(
            source(),
            folder / name,
            model_id=model_id,
            version=version,
            services=[LocalKMS(key, entropy=entropy(f"{name} nonce"))],
            signer=LocalSigner(private_key),
            suite=suite,
            chunk_bytes=CHUNK_BYTES,
            licence="Apache-2.0",
            entropy=entropy(name),
        )


def edits(folder: Path) -> list[dict[str, Any]]:
    header = parse_header((folder / "gcm" / FIRST).read_bytes()[:HEADER_BYTES], FIRST)
    payload, tags = header.payload_offset, header.tags_offset
    core = (folder / "gcm" / "core.json").read_bytes()
    bit = lambda file, at: {"file": file, "at": at, "xor": 1}  # noqa: E731
    take = lambda file, other: {"file": file, "from": f"{other}/{file}"}  # noqa: E731
    cases: list[tuple[str, str, list[dict[str, Any]]]] = [
        ("untouched", "success", []),
        ("leftover of a killed rewrap is ignored", "success", [{"file": "recipients.json.tmp", "append": "7b"}]),
        ("bit of the magic", "header", [bit(FIRST, 0)]),
        ("bit of the shard number", "header", [bit(FIRST, 12)]),
        ("bit of the core digest in a header", "header", [bit(FIRST, 48)]),
        ("bit of the reserved bytes", "header", [bit(FIRST, 95)]),
        ("bit of the number of chunks", "header", [bit(FIRST, 24)]),
        ("bit of the index", "payload", [bit(FIRST, HEADER_BYTES)]),
        ("bit of chunk 1", "payload", [bit(FIRST, payload)]),
        ("bit of the last chunk", "payload", [bit(FIRST, tags - 1)]),
        ("bit of a tag", "signature", [bit(FIRST, -1)]),
        ("last byte cut off", "header", [{"file": FIRST, "truncate": header.file_bytes - 1}]),
        ("shard cut to its header", "header", [{"file": FIRST, "truncate": HEADER_BYTES}]),
        ("shard empty", "header", [{"file": FIRST, "truncate": 0}]),
        ("trailing byte", "header", [{"file": FIRST, "append": "00"}]),
        ("shard missing", "header", [{"file": SECOND, "delete": True}]),
        ("shards exchanged", "header", [{"file": FIRST, "from": f"gcm/{SECOND}"}]),
        ("shard of another version", "header", [take(FIRST, "gcm-v1")]),
        ("shard of another model", "header", [take(FIRST, "other")]),
        ("shard of the other suite", "header", [take(FIRST, "chacha")]),
        ("two chunks exchange 1,000 bytes", "payload", [{"file": FIRST, "swap": [payload, payload + 65536, 256]}]),
        ("tags of two chunks exchanged", "signature", [{"file": FIRST, "swap": [tags, tags + 16, 16]}]),
        ("core of another version", "signature", [take("core.json", "gcm-v1")]),
        ("version in the core raised", "signature", [bit("core.json", core.index(b'"version":2') + 10)]),
        ("manifest of another version", "signature", [take("manifest.json", "gcm-v1")]),
        ("manifest and signature of another version", "signature", [take(n, "gcm-v1") for n in SIGNED]),
        ("bit of the signature", "signature", [bit("model.sig", 150)]),
        ("signature missing", "signature", [{"file": "model.sig", "delete": True}]),
        ("signature of another model", "signature", [take("model.sig", "other")]),
        ("config altered", "signature", [bit("config.json", 3)]),
        ("config missing", "header", [{"file": "config.json", "delete": True}]),
        ("surplus file", "header", [{"file": "generation_config.json", "append": "7b7d"}]),
        ("plain weights beside", "header", [{"file": "model.safetensors", "append": "00"}]),
        ("recipients of another model", "header", [take("recipients.json", "other")]),
        ("bit of the wrapped key", "key", [{"file": "recipients.json", "at": -20, "xor": 1}]),
        ("recipients with a trailing blank", "header", [{"file": "recipients.json", "append": "20"}]),
        ("recipients missing", "header", [{"file": "recipients.json", "delete": True}]),
    ]  # fmt: skip
    vectors: list[dict[str, Any]] = [{"name": n, "base": "gcm", "expected": e, "edits": c} for n, e, c in cases]
    vectors += [
        {"name": "untouched, ChaCha20-Poly1305", "base": "chacha", "expected": "success", "edits": []},
        {"name": "bit of chunk 1, ChaCha20", "base": "chacha", "expected": "payload", "edits": [bit(FIRST, payload)]},
        {"name": "older version above no floor", "base": "gcm-v1", "expected": "success", "edits": []},
        {"name": "older version below the floor", "base": "gcm-v1", "expected": "version", "floor": 2, "edits": []},
    ]
    return vectors


def generate(folder: Path) -> None:
    """Write every vector file into `folder`."""
    bases(folder)
    tensors = {
        e.name: {
            "dtype": e.dtype,
            "shape": list(e.shape),
            "sha256": hashlib.sha256(hashlib.shake_256(e.name.encode()).digest(e.num_bytes)).hexdigest(),
        }
        for shard in source().shards
        for e in shard.index.entries
    }
    content = {"kek_hex": bytes(range(32)).hex(), "tensors": tensors, "vectors": edits(folder)}
    (folder / "vectors.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Regenerate in place; the diff, if any, is git's to show."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        for path in Path(scratch).iterdir():
            target = HERE / path.name
            if path.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(path, target)
            else:
                shutil.copy(path, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
