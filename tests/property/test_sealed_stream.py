"""A chunk opens in its own place and nowhere else, under its own key and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import SealError
from server.sealed.format import TAG_BYTES, Kind, ShardHeader, Suite
from server.sealed.stream import ShardCipher

HEADER = ShardHeader(Kind.WEIGHTS, 1, 3, 1 << 16, 5, 10, 100, bytes(range(32)))
KEY = bytes(32)
suites = st.sampled_from(Suite)


@given(suites, st.binary(min_size=1, max_size=300), st.integers(0, 4))
def test_round_trip(suite: Suite, plaintext: bytes, chunk: int) -> None:
    cipher = ShardCipher(suite, KEY, HEADER, "shard")
    sealed = bytearray(len(plaintext) + TAG_BYTES)
    cipher.seal_into(chunk, plaintext, sealed)
    opened = memoryview(bytearray(len(plaintext)))
    cipher.open_into(chunk, sealed, opened)
    assert bytes(opened) == plaintext


@given(suites, st.binary(min_size=1, max_size=60), st.data())
def test_any_changed_bit_is_refused_and_leaves_nothing(suite: Suite, plaintext: bytes, data: st.DataObject) -> None:
    cipher = ShardCipher(suite, KEY, HEADER, "shard")
    sealed = bytearray(len(plaintext) + TAG_BYTES)
    cipher.seal_into(2, plaintext, sealed)
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    target = memoryview(bytearray(b"\xaa" * len(plaintext)))
    with pytest.raises(SealError) as refused:
        cipher.open_into(2, sealed, target)
    assert bytes(target) == bytes(len(plaintext))
    assert refused.value.detail == "shard: chunk 2 of 5: authentication failed"


@given(suites, st.integers(0, 4), st.integers(0, 4))
def test_no_other_place(suite: Suite, chunk: int, other: int) -> None:
    cipher = ShardCipher(suite, KEY, HEADER, "shard")
    sealed = bytearray(20 + TAG_BYTES)
    cipher.seal_into(chunk, bytes(20), sealed)
    strangers = [
        replace(HEADER, shard=2), replace(HEADER, num_shards=4), replace(HEADER, kind=Kind.FILES),
        replace(HEADER, num_chunks=6), replace(HEADER, payload_bytes=101), replace(HEADER, core_digest=bytes(32)),
    ]  # fmt: skip
    attempts = [(ShardCipher(suite, KEY, header, "s"), chunk) for header in strangers]
    attempts.append((ShardCipher(suite, bytes(31) + b"\1", HEADER, "s"), chunk))
    if other != chunk:
        attempts.append((cipher, other))
    for reader, place in attempts:
        with pytest.raises(SealError):
            reader.open_into(place, sealed, memoryview(bytearray(20)))
