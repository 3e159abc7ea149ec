"""Tile files (C2SP tlog-tiles): where they lie, how they are read, which proofs they give. Never writes."""

from __future__ import annotations

import struct
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from server.audit.merkle import (
    HASH_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    consistency_proof,
    inclusion_proof,
    node_hash,
    subtree_hash,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MAX_BUNDLE_BYTES = TILE_WIDTH * (2 + 65_535)


class TileError(ValueError):
    """A tile or bundle is missing, short or malformed."""


def _index_path(index: int) -> str:
    parts = [f"{index % 1000:03d}"]
    index //= 1000
    while index:
        parts.append(f"x{index % 1000:03d}")
        index //= 1000
    return "/".join(reversed(parts))


def tile_path(level: int | None, index: int, width: int = TILE_WIDTH) -> str:
    """Return a tile's path below the log's folder.

    Args:
        level: The tile's level; None for an entry bundle.
        index: The tile's index in its level.
        width: Fewer than 256 for a partial tile.
    """
    place = "entries" if level is None else str(level)
    suffix = "" if width == TILE_WIDTH else f".p/{width}"
    return f"tile/{place}/{_index_path(index)}{suffix}"


def pack_entries(entries: Iterable[bytes]) -> bytes:
    """Return the entries, each behind its big-endian uint16 length."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def split_entries(data: bytes) -> list[bytes]:
    """Return the entries of a bundle, a commit or a message.

    Raises:
        TileError: The lengths do not add up.
    """
    entries: list[bytes] = []
    at, end = 0, len(data)
    append = entries.append
    while at + 2 <= end:
        stop = at + 2 + (data[at] << 8 | data[at + 1])
        append(data[at + 2 : stop])
        at = stop
    if at != end:
        raise TileError("The entries' lengths do not add up.")
    return entries


def unpack_hashes(data: bytes) -> list[bytes]:
    """Return the hashes of a tile."""
    return [value for (value,) in struct.iter_unpack(f"{HASH_BYTES}s", data)]


def _read(directory: Path, level: int | None, index: int, width: int, least_bytes: int, limit_bytes: int) -> bytes:
    base = directory / tile_path(level, index)
    candidates = [base, directory / tile_path(level, index, width)]
    folder = base.with_name(base.name + ".p")
    if folder.is_dir():
        wider = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        candidates += [folder / str(found) for found in wider if found > width]
    for path in candidates:
        try:
            with path.open("rb") as file:
                data = file.read(limit_bytes)
        except FileNotFoundError:
            continue
        if len(data) >= least_bytes:  # a full tile torn by a power cut is short; its partial ones still stand
            return data
    raise TileError(f"{tile_path(level, index, width)} is missing or short.")


def _read_hashes(directory: Path, level: int, index: int, width: int) -> tuple[bytes, ...]:
    data = _read(directory, level, index, width, width * HASH_BYTES, TILE_WIDTH * HASH_BYTES)
    return tuple(unpack_hashes(data[: width * HASH_BYTES]))


class TileReader:
    """Reads one log's tiles; hash tiles are cached, since a proof asks for the same few again and again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Not around a method of our own: a reader that holds itself waits for the cycle collector.
        self._cached = lru_cache(maxsize=256)(partial(_read_hashes, directory))

    def hashes(self, level: int, index: int, width: int) -> list[bytes]:
        """Return the first `width` hashes of a tile.

        Raises:
            TileError: Missing or short.
        """
        return list(self._cached(level, index, width))

    def entries(self, index: int, width: int) -> list[bytes]:
        """Return the first `width` entries of a bundle.

        Raises:
            TileError: Missing, short or malformed.
        """
        entries = split_entries(_read(self.directory, None, index, width, 4 * width, MAX_BUNDLE_BYTES + 1))
        if len(entries) < width:
            raise TileError(f"{tile_path(None, index, width)} is short: {len(entries)} entries.")
        return entries[:width]

    def range_hash(self, low: int, high: int, size: int) -> bytes:
        """Return the Merkle tree hash over leaves [low, high) of a tree of `size`; `low` is as RFC 6962 splits it."""
        count = high - low
        if count & (count - 1) == 0 and low % count == 0:
            height = count.bit_length() - 1
            level = height // TILE_HEIGHT
            span = 1 << (height % TILE_HEIGHT)
            first = low >> (TILE_HEIGHT * level)
            index, offset = divmod(first, TILE_WIDTH)
            width = min(TILE_WIDTH, (size >> (TILE_HEIGHT * level)) - index * TILE_WIDTH)
            return subtree_hash(self._cached(level, index, width)[offset : offset + span])
        middle = low + (1 << (count - 1).bit_length() - 1)
        return node_hash(self.range_hash(low, middle, size), self.range_hash(middle, high, size))

    def root(self, size: int) -> bytes:
        """Return the root of the tree of `size` leaves."""
        return self.range_hash(0, size, size) if size else subtree_hash([])

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the audit path of an entry."""
        return inclusion_proof(index, size, lambda low, high: self.range_hash(low, high, size))

    def consistency(self, old: int, new: int) -> list[bytes]:
        """Return the proof that the tree of `old` leaves is a prefix of that of `new`."""
        return consistency_proof(old, new, lambda low, high: self.range_hash(low, high, new))

    def entry(self, index: int, size: int) -> bytes:
        """Return one entry of a tree of `size` leaves."""
        bundle, offset = divmod(index, TILE_WIDTH)
        return self.entries(bundle, min(TILE_WIDTH, size - bundle * TILE_WIDTH))[offset]
