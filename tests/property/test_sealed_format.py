"""Parsers of the sealed format give back what was marshalled, and refuse the rest without any other exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import SealError
from server.sealed import format as sealed
from server.sealed.format import (
    Core,
    FileRecord,
    Index,
    IndexEntry,
    Kind,
    Manifest,
    Recipient,
    ShardHeader,
    ShardRecord,
    Suite,
)

hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
texts = st.text(st.characters(codec="utf-8"), max_size=30)
text_maps = st.dictionaries(texts, texts, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)

cores = st.builds(
    Core,
    model_id=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    version=st.integers(1, 2**53 - 1),
    seal_id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    suite=st.sampled_from(Suite),
    chunk_bytes=st.sampled_from([1 << n for n in range(16, 25)]),
    dtype=texts,
    quantization=texts,
)
headers = st.builds(
    lambda kind, num, chunk_bytes, num_chunks, index_bytes, payload_bytes, digest, data: ShardHeader(
        kind, data.draw(st.integers(0, num - 1)), num, chunk_bytes, num_chunks, index_bytes, payload_bytes, digest
    ),
    st.sampled_from(Kind),
    st.integers(1, sealed.MAX_SHARDS),
    st.sampled_from([1 << 16, 1 << 20, 1 << 24]),
    st.integers(1, sealed.MAX_CHUNKS),
    st.integers(1, sealed.MAX_INDEX_BYTES),
    st.integers(0, sealed.MAX_PAYLOAD_BYTES),
    st.binary(min_size=32, max_size=32),
    st.data(),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    num_shards = draw(st.integers(1, 4))
    names = [sealed.shard_name(i, num_shards) for i in range(num_shards)]
    if draw(st.booleans()):
        names.append(sealed.FILES_SHARD_NAME)
    files = draw(st.sets(st.from_regex(r"[A-Za-z0-9_]{1,8}\.txt", fullmatch=True), max_size=4))
    sizes = st.integers(0, 2**40)
    return Manifest(
        core_sha256=draw(hexes),
        key_check=draw(hexes),
        shards=tuple(ShardRecord(n, draw(sizes), draw(hexes), draw(hexes)) for n in names),
        files=tuple(FileRecord(n, draw(st.integers(0, sealed.MAX_FILE_BYTES)), draw(hexes)) for n in sorted(files)),
        lineage=draw(text_maps),
        licence=draw(texts),
    )


@given(cores)
def test_core(core: Core) -> None:
    assert sealed.parse_core(sealed.marshal_core(core)) == core


@given(headers)
def test_header(header: ShardHeader) -> None:
    data = sealed.marshal_header(header)
    assert len(data) == sealed.HEADER_BYTES
    assert sealed.parse_header(data, "shard") == header


@given(manifests())
def test_manifest(manifest: Manifest) -> None:
    assert sealed.parse_manifest(sealed.marshal_manifest(manifest)) == manifest


@given(st.lists(st.builds(Recipient, texts, texts, st.binary(max_size=80), text_maps), min_size=1, max_size=5), hexes)
def test_recipients(recipients: list[Recipient], digest: str) -> None:
    data = sealed.marshal_recipients(digest, tuple(recipients))
    assert sealed.parse_recipients(data) == (digest, tuple(recipients))


@given(st.lists(st.tuples(texts, st.lists(st.integers(0, 40), max_size=3)), unique_by=lambda t: t[0], max_size=6))
def test_index(tensors: list[tuple[str, list[int]]]) -> None:
    entries = []
    for name, shape in tensors:
        num_bytes = 4
        for size in shape:
            num_bytes *= size
        entries.append(IndexEntry(name, "F32", tuple(shape), num_bytes))
    index = Index(tuple(entries), {"format": "pt"})
    payload = sum(e.num_bytes for e in entries)
    chunks = 1 + sum(sealed.num_pieces(e.num_bytes, 1 << 16) for e in entries)
    data = sealed.marshal_index(index)
    header = ShardHeader(Kind.WEIGHTS, 0, 1, 1 << 16, chunks, len(data), payload, bytes(32))
    assert sealed.parse_index(data, header, "shard") == index


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_parsers_refuse_and_never_crash(data: bytes) -> None:
    for parse in (sealed.parse_core, sealed.parse_manifest, sealed.parse_recipients):
        with pytest.raises(SealError):
            parse(data)
    header = ShardHeader(Kind.WEIGHTS, 0, 1, 1 << 16, 1, max(1, len(data)), 0, bytes(32))
    with pytest.raises(SealError):
        sealed.parse_index(data + b" ", header, "shard")


@given(st.binary(min_size=sealed.HEADER_BYTES, max_size=sealed.HEADER_BYTES))
def test_random_headers_are_refused(data: bytes) -> None:
    with pytest.raises(SealError):
        sealed.parse_header(data, "shard")


@given(cores, st.data())
def test_a_core_that_is_changed_anywhere_is_refused_or_another(core: Core, data: st.DataObject) -> None:
    encoded = bytearray(sealed.marshal_core(core))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        parsed: Any = sealed.parse_core(bytes(encoded))
    except SealError as err:
        assert err.kind == "header"  # noqa: PT017 - refusing is one of two right outcomes
    else:
        assert parsed != core


@given(cores, st.sampled_from(["extra", "suite", "model_id"]))
def test_unknown_missing_and_repeated_keys(core: Core, key: str) -> None:
    value = json.loads(sealed.marshal_core(core))
    value[key] = value.get(key, 1) if key == "extra" else None
    with pytest.raises(SealError):
        sealed.parse_core(sealed.canonical_json(value))
    del value[key]
    if key != "extra":
        with pytest.raises(SealError):
            sealed.parse_core(sealed.canonical_json(value))
    repeated = sealed.marshal_core(core).replace(b'{"chunk_bytes"', b'{"chunk_bytes":65536,"chunk_bytes"', 1)
    with pytest.raises(SealError):
        sealed.parse_core(repeated)
