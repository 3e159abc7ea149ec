"""Attacks W2, W3: whoever can write the model folder alters it. Each is refused; file and chunk go to the log."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from server.errors import KMSDeniedError, SealError, StartError
from server.sealed.format import HEADER_BYTES, TAG_BYTES, canonical_json, parse_header
from server.sealed.shard import ShardReader
from server.sealed.signature import verify_bundle
from server.sealed.stream import ShardCipher
from tests.unit.sealed.workshop import CHUNK_BYTES, Workshop, load, open_workshop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FIRST, SECOND = "model-00001-of-00002.sealed", "model-00002-of-00002.sealed"
PUBLIC_MESSAGE = "The sealed model was refused."
SEED = 20261122


@dataclass
class Target:
    """A sealed model that is altered, tried and restored, again and again."""

    workshop: Workshop
    path: Path
    pristine: dict[str, bytes]

    def restore(self) -> None:
        for path in self.path.iterdir():
            if path.name not in self.pristine:
                path.unlink()
        for name, content in self.pristine.items():
            path = self.path / name
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)

    def refused(self, *, naming: str | None = None) -> StartError:
        with pytest.raises((SealError, KMSDeniedError)) as refused:
            load(self.path, self.workshop)
        self.restore()
        if isinstance(refused.value, SealError):
            assert str(refused.value) == PUBLIC_MESSAGE
            assert naming is None or naming in refused.value.detail, refused.value.detail
        return refused.value

    def put(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)

    def flip(self, name: str, bit: int) -> None:
        data = bytearray(self.pristine[name])
        data[bit // 8] ^= 1 << bit % 8
        self.put(name, bytes(data))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return open_workshop(tmp_path_factory.mktemp("tampering"))


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Path:
    return workshop.seal("pristine", version=3)


@pytest.fixture
def target(workshop: Workshop, whole: Path, tmp_path: Path) -> Target:
    path = tmp_path / "model"
    shutil.copytree(whole, path)
    return Target(workshop, path, {p.name: p.read_bytes() for p in whole.iterdir()})


def test_every_bit_of_a_shard_header(target: Target) -> None:
    for bit in range(HEADER_BYTES * 8):
        target.flip(SECOND, bit)
        assert target.refused(naming=SECOND).code == "model_refused"


@pytest.mark.parametrize("name", ["core.json", "manifest.json", "model.sig", "recipients.json", "config.json"])
def test_bits_of_every_small_file(target: Target, name: str) -> None:
    num_bits = len(target.pristine[name]) * 8
    generator = random.Random(SEED)  # noqa: S311 - seeded on purpose
    for bit in generator.sample(range(num_bits), min(150, num_bits)):
        target.flip(name, bit)
        target.refused()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["core.json", "manifest.json", "model.sig", "recipients.json", "config.json"])
def test_every_bit_of_every_small_file(target: Target, name: str) -> None:
    for bit in range(len(target.pristine[name]) * 8):
        target.flip(name, bit)
        target.refused()


def test_bits_of_index_payload_and_tags_name_the_chunk(target: Target) -> None:
    generator = random.Random(SEED)  # noqa: S311 - seeded on purpose
    for name in (FIRST, SECOND):
        data = target.pristine[name]
        header = parse_header(data[:HEADER_BYTES], name)
        for _ in range(100):
            byte = generator.randrange(HEADER_BYTES, len(data))
            target.flip(name, byte * 8 + generator.randrange(8))
            refusal = target.refused(naming=name)
            assert isinstance(refusal, SealError)
            if byte >= header.tags_offset:
                assert refusal.kind == "signature"
            else:
                assert refusal.kind == "payload"
                chunk = re.search(r"chunk (\d+) of (\d+)", refusal.detail)
                assert chunk is not None
                assert int(chunk[2]) == header.num_chunks
                assert (int(chunk[1]) == 0) == (byte < header.payload_offset)


def test_the_destination_is_zeroed_when_a_chunk_fails(target: Target) -> None:
    offset = parse_header(target.pristine[FIRST][:HEADER_BYTES], FIRST).payload_offset + CHUNK_BYTES + 5
    target.flip(FIRST, offset * 8)
    model, key = released(target)
    with ShardReader(target.path, model.weights[0], model.core, key) as reader:
        buffer = bytearray(b"\xff" * 153_600)
        with pytest.raises(SealError, match="refused"):
            reader.read_into("embed", memoryview(buffer))
    assert buffer == bytes(len(buffer))


def released(target: Target):
    from server.sealed.agent import KeyAgent

    agent = KeyAgent(
        services=[target.workshop.kms], trusted_signers=target.workshop.trusted, record=lambda _tag, **_fields: None
    )
    release = agent.release(target.path)
    return release.model, release.data_key.reveal()


def test_truncation_at_every_boundary(target: Target) -> None:
    for name in (FIRST, SECOND):
        data = target.pristine[name]
        header = parse_header(data[:HEADER_BYTES], name)
        edges = {0, 8, HEADER_BYTES, header.payload_offset, header.tags_offset, len(data)}
        edges |= {header.payload_offset + i * CHUNK_BYTES for i in range(header.num_chunks)}
        edges |= {header.tags_offset + i * TAG_BYTES for i in range(header.num_chunks)}
        for cut in sorted({e + d for e in edges for d in (-1, 0, 1)} & set(range(len(data)))):
            target.put(name, data[:cut])
            target.refused(naming=name)
    for name in ("core.json", "manifest.json", "model.sig", "recipients.json"):
        for cut in range(0, len(target.pristine[name]), 37):
            target.put(name, target.pristine[name][:cut])
            target.refused()


def test_trailing_bytes(target: Target) -> None:
    for name, extra in itertools.product(target.pristine, (b"\0", b" ", b"\n", b"{}", b"x" * 4096)):
        target.put(name, target.pristine[name] + extra)
        target.refused(naming=name if name.endswith(".sealed") else None)


def chunk_moves(data: bytes, name: str) -> Iterator[bytes]:
    """The payload with chunks swapped, dropped and duplicated, with and without their tags."""
    header = parse_header(data[:HEADER_BYTES], name)
    body = data[header.payload_offset : header.tags_offset]
    tags = [data[header.tags_offset + i * TAG_BYTES :][:TAG_BYTES] for i in range(header.num_chunks)]
    head = data[: header.payload_offset]
    a, b = body[:CHUNK_BYTES], body[CHUNK_BYTES : 2 * CHUNK_BYTES]
    rest = body[2 * CHUNK_BYTES :]
    swapped = [tags[0], tags[2], tags[1], *tags[3:]]
    yield head + b + a + rest + b"".join(tags)
    yield head + b + a + rest + b"".join(swapped)
    yield head + a + a + rest + b"".join([tags[0], tags[1], tags[1], *tags[3:]])
    yield head + b + rest + b"".join([tags[0], *tags[2:]])
    yield head + a + a + b + rest + b"".join([tags[0], tags[1], *tags[1:]])
    yield data[:24] + (header.num_chunks - 1).to_bytes(8, "little") + data[32:-TAG_BYTES]


def test_chunks_swapped_dropped_and_duplicated(target: Target) -> None:
    for content in chunk_moves(target.pristine[FIRST], FIRST):
        target.put(FIRST, content)
        target.refused(naming=FIRST)


def test_chunks_and_shards_of_another_seal_model_or_version(target: Target, workshop: Workshop) -> None:
    for label, version, model_id in (("seal", 3, "tiny"), ("version", 2, "tiny"), ("model", 3, "other")):
        other = workshop.seal(label, version=version, model_id=model_id)
        for name in target.pristine:
            foreign = (other / name).read_bytes()
            if foreign != target.pristine[name]:
                target.put(name, foreign)
                target.refused()
        for name in (FIRST, SECOND):
            mine, foreign = target.pristine[name], (other / name).read_bytes()
            for start, end in ((96, 200), (2000, 2000 + CHUNK_BYTES), (len(mine) - 16, len(mine))):
                target.put(name, mine[:start] + foreign[start:end] + mine[end:])
                target.refused(naming=name)
        for subset in itertools.combinations(("core.json", "manifest.json", "model.sig", "recipients.json"), 3):
            for name in subset:
                target.put(name, (other / name).read_bytes())
            target.refused()
        shutil.rmtree(other)


def test_chunks_moved_between_shards(target: Target) -> None:
    first, second = target.pristine[FIRST], target.pristine[SECOND]
    target.put(FIRST, second)
    target.put(SECOND, first)
    target.refused(naming=FIRST)
    offset = parse_header(second[:HEADER_BYTES], SECOND).payload_offset
    target.put(SECOND, second[:offset] + first[offset : offset + 8192] + second[offset + 8192 :])
    target.refused(naming=SECOND)


def test_older_manifest_with_its_own_signature(target: Target, workshop: Workshop) -> None:
    older = workshop.seal("older", version=1)
    for name in ("manifest.json", "model.sig"):
        target.put(name, (older / name).read_bytes())
    target.refused(naming="core.json")
    shutil.rmtree(older)


def test_manifest_resigned_by_a_stranger(target: Target, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    other = open_workshop(folder).seal()
    target.put("model.sig", (other / "model.sig").read_bytes())
    target.refused(naming="no trusted signer")


def test_wrapped_key_under_another_context(target: Target, workshop: Workshop) -> None:
    changes: dict[str, Callable[[dict[str, object]], dict[str, object]]] = {
        "model_id": lambda core: core | {"model_id": "renamed"},
        "version": lambda core: core | {"version": 9},
        "seal_id": lambda core: core | {"seal_id": "0" * 32},
    }
    # Whoever may sign (or where unsigned models are allowed) still can't move a wrapped key to another context.
    from server.sealed.envelope import unwrap_from_any
    from server.sealed.kms.base import KeyContext
    from server.sealed.model import open_sealed

    recipients = open_sealed(target.path, trusted_signers=workshop.trusted).recipients
    core = json.loads(target.pristine["core.json"])
    for change in changes.values():
        altered = change(core)
        context = KeyContext(str(altered["model_id"]), int(str(altered["version"])), str(altered["seal_id"]))
        with pytest.raises(KMSDeniedError):
            unwrap_from_any(recipients, [workshop.kms], context)
    with pytest.raises(KMSDeniedError):
        unwrap_from_any(
            recipients, [workshop.kms], KeyContext(core["model_id"], core["version"], core["seal_id"], "files")
        )


def test_every_bit_of_the_signature_itself(target: Target) -> None:
    """Of the bytes that the signer computed; the file around them has a campaign of its own."""
    bundle = json.loads(target.pristine["model.sig"])
    (entry,) = bundle["dsseEnvelope"]["signatures"]
    signature = base64.b64decode(entry["sig"])
    assert len(signature) > 60
    for bit in range(len(signature) * 8):
        altered = bytearray(signature)
        altered[bit // 8] ^= 1 << bit % 8
        entry["sig"] = base64.b64encode(altered).decode()
        with pytest.raises(SealError) as refused:
            verify_bundle(canonical_json(bundle), trusted=target.workshop.trusted)
        assert refused.value.kind == "signature"
    entry["sig"] = base64.b64encode(signature).decode()
    verify_bundle(canonical_json(bundle), trusted=target.workshop.trusted)


class Resealer:
    """Whoever had the data key once: seals chunks of the first shard anew, with the right key, nonce and data."""

    def __init__(self, target: Target) -> None:
        model, self.key = released(target)
        self.model, self.shard = model, model.weights[0]
        self.header = self.shard.header
        self.cipher = ShardCipher(model.core.suite, self.key, self.header, FIRST)
        self.data = bytearray(target.pristine[FIRST])

    def _range(self, chunk: int) -> slice:
        if chunk == 0:
            return slice(HEADER_BYTES, self.header.payload_offset)
        start = self.header.payload_offset + (chunk - 1) * CHUNK_BYTES
        return slice(start, start + CHUNK_BYTES)

    def open(self, chunk: int) -> bytes:
        sealed = bytes(self.data[self._range(chunk)])
        plain = memoryview(bytearray(len(sealed)))
        self.cipher.open_into(chunk, sealed + self.shard.tags[TAG_BYTES * chunk :][:TAG_BYTES], plain)
        return bytes(plain)

    def seal(self, chunk: int, plain: bytes) -> None:
        out = bytearray(len(plain) + TAG_BYTES)
        self.cipher.seal_into(chunk, plain, out)
        self.data[self._range(chunk)] = out[:-TAG_BYTES]
        tag = self.header.tags_offset + TAG_BYTES * chunk
        self.data[tag : tag + TAG_BYTES] = out[-TAG_BYTES:]


def test_tensors_renamed_or_exchanged_by_a_holder_of_the_data_key(target: Target) -> None:
    """The signature over the tags refuses what the right key sealed."""
    resealer = Resealer(target)
    index = resealer.open(0)
    first, second = resealer.open(1), resealer.open(2)
    assert b"embed" in index
    assert first != second
    changes = {
        "renamed": {0: index.replace(b"embed", b"exact", 1)},
        "names exchanged": {0: index.replace(b"embed", b"?", 1).replace(b"exact", b"embed").replace(b"?", b"exact")},
        "values exchanged": {1: second, 2: first},
        "a value changed": {1: bytes([first[0] ^ 1]) + first[1:]},
    }
    for change in changes.values():
        resealer = Resealer(target)
        for chunk, plain in change.items():
            resealer.seal(chunk, plain)
        assert resealer.data != target.pristine[FIRST]
        target.put(FIRST, bytes(resealer.data))
        refusal = target.refused(naming=FIRST)
        assert isinstance(refusal, SealError)
        assert refusal.kind == "signature"


def test_a_shard_replaced_between_verification_and_load(target: Target) -> None:
    """Even by chunks that the right data key sealed: the reader uses the tags that were verified, not those on disk."""
    for chunk in (0, 1, 2):
        resealer = Resealer(target)
        resealer.seal(chunk, bytes(b ^ 1 for b in resealer.open(chunk)))
        replaced = target.path / "replacement"
        replaced.write_bytes(resealer.data)
        replaced.rename(target.path / FIRST)
        buffer = bytearray(153_600)
        with (
            pytest.raises(SealError) as refused,
            ShardReader(target.path, resealer.shard, resealer.model.core, resealer.key) as reader,
        ):
            reader.read_into("embed", memoryview(buffer))
        assert refused.value.kind == "payload"
        assert refused.value.detail.startswith(f"{FIRST}: chunk {chunk} of ")
        assert buffer == bytes(len(buffer))
        target.restore()


def test_a_shard_exchanged_or_cut_while_it_is_open(target: Target) -> None:
    """Written over in place, the file that is open is another one from one tensor to the next."""
    model, key = released(target)
    with ShardReader(target.path, model.weights[0], model.core, key) as reader:
        reader.read_into("embed", memoryview(bytearray(153_600)))
        with (target.path / FIRST).open("r+b") as file:
            file.seek(model.weights[0].header.payload_offset)
            file.write(bytes(model.weights[0].header.payload_bytes))
        last = reader.index.entries[-1]
        for entry in (reader.index.entries[0], last):
            with pytest.raises(SealError, match="refused"):
                reader.read_into(entry.name, memoryview(bytearray(entry.num_bytes)))
        os.truncate(target.path / FIRST, len(target.pristine[FIRST]) - 3000)
        with pytest.raises(SealError, match="refused"):
            reader.read_into(last.name, memoryview(bytearray(last.num_bytes)))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "modeling_tiny.py", "pytorch_model.bin", "extra.json", ".hidden"]
)
def test_surplus_files(target: Target, name: str) -> None:
    target.put(name, b"{}")
    target.refused(naming=name)


def test_links_folders_and_missing_files(target: Target) -> None:
    for name in target.pristine:
        (target.path / name).rename(target.path.parent / "aside")
        if name != "model.sig":
            target.refused()
        (target.path / name).unlink(missing_ok=True)
        (target.path / name).symlink_to(target.path.parent / "aside")
        assert target_refuses_link(target)
        (target.path / name).unlink()
        target.restore()
    (target.path / "folder").mkdir()
    with pytest.raises(SealError):
        load(target.path, target.workshop)


def target_refuses_link(target: Target) -> bool:
    with pytest.raises(SealError) as refused:
        load(target.path, target.workshop)
    return "not a regular file" in refused.value.detail


def test_the_campaign_is_not_vacuous(target: Target) -> None:
    tensors = load(target.path, target.workshop)
    assert (
        hashlib.sha256(tensors["embed"]).hexdigest()
        == hashlib.sha256(hashlib.shake_256(b"embed").digest(153_600)).hexdigest()
    )
