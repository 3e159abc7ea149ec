"""Every vector ends as it says: success with the right bytes, or that kind of failure."""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.errors import KMSError, SealError
from server.sealed.agent import KeyAgent
from server.sealed.kms.local import LocalKMS
from server.sealed.shard import ShardReader
from server.sealed.signature import TrustedSigner
from tests.vectors.sealed.generate import generate

HERE = Path(__file__).parent
CONTENT: dict[str, Any] = json.loads((HERE / "vectors.json").read_text())


def apply(edit: dict[str, Any], folder: Path) -> None:
    path = folder / edit["file"]
    data = bytearray(path.read_bytes()) if path.exists() else bytearray()
    match edit:
        case {"at": at, "xor": xor}:
            data[at] ^= xor
        case {"truncate": length}:
            del data[length:]
        case {"append": more}:
            data += bytes.fromhex(more)
        case {"from": other}:
            data[:] = (HERE / other).read_bytes()
        case {"swap": [a, b, n]}:
            data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
        case {"delete": True}:
            path.unlink()
            return
    path.write_bytes(data)


def load(folder: Path, key: Path, floor: int) -> dict[str, str]:
    agent = KeyAgent(
        services=[LocalKMS(key)],
        trusted_signers=[TrustedSigner.load(HERE / "signer.pub")],
        record=lambda _tag, **_fields: None,
    )
    release = agent.release(folder, floor=floor)
    digests = {}
    with release.data_key as data_key:
        for shard in release.model.weights:
            with ShardReader(folder, shard, release.model.core, data_key.reveal()) as reader:
                for entry in reader.index.entries:
                    buffer = bytearray(entry.num_bytes)
                    reader.read_into(entry.name, memoryview(buffer))
                    digests[entry.name] = hashlib.sha256(buffer).hexdigest()
    return digests


def outcome(folder: Path, key: Path, floor: int) -> str:
    try:
        digests = load(folder, key, floor)
    except KMSError:
        return "key"
    except SealError as err:
        return err.kind
    return "success" if digests == {n: t["sha256"] for n, t in CONTENT["tensors"].items()} else "wrong bytes"


@pytest.mark.parametrize("vector", CONTENT["vectors"], ids=lambda v: v["name"])
def test_vector(vector: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(HERE / vector["base"], folder)
    key = tmp_path / "kms.key"
    shutil.copy(HERE / "kms.key", key)
    key.chmod(0o600)
    for edit in vector["edits"]:
        apply(edit, folder)
    assert outcome(folder, key, vector.get("floor", 1)) == vector["expected"]


def test_regenerating_gives_no_difference(tmp_path: Path) -> None:
    generate(tmp_path)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert filecmp.cmp(path, HERE / path.relative_to(tmp_path), shallow=False), path.name
