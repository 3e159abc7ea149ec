"""The journal's commits: header, entries, signed checkpoint, checksum; docs/specs/audit-log.md, section 4."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from server.audit.checkpoint import MAX_NOTE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = "journal"
MAX_COMMIT_BYTES = 16 * 1024 * 1024
_HEADER = struct.Struct(">4sQIIH")
_CRC = struct.Struct(">I")
_MAGIC = b"SRc1"
_SEGMENT_NAME = re.compile(r"[0-9]{20}\.log")
_MAX_LINE_BYTES = 1_024


class JournalError(ValueError):
    """A segment or commit is damaged.

    Args:
        message: What is wrong.
        index: The first entry at fault.
        offset: Where in the segment the commit begins.
        torn_bytes: Bytes from there to the last that is not zero, if a torn last write looks like this; else 0.
    """

    def __init__(self, message: str, *, index: int, offset: int, torn_bytes: int = 0) -> None:
        super().__init__(message)
        self.index = index
        self.offset = offset
        self.torn_bytes = torn_bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """One group of entries that became durable together."""

    first: int
    count: int
    entries: bytes
    note: bytes
    offset: int
    end: int


def segment_name(first: int) -> str:
    """Return the file name of the segment whose first entry is `first`."""
    return f"{first:020d}.log"


def segment_line(origin: str, first: int) -> bytes:
    """Return the first line of a segment."""
    return f"strongroom-journal/1 {origin} {first}\n".encode()


def list_segments(directory: Path) -> list[tuple[int, Path]]:
    """Return (first index, path) of every segment, in order.

    Raises:
        JournalError: A file that is no segment lies there.
    """
    segments = []
    folder = directory / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        if _SEGMENT_NAME.fullmatch(path.name) is None:
            raise JournalError(f"journal/{path.name} is not a segment.", index=0, offset=0)
        segments.append((int(path.name[:20]), path))
    return segments


def encode_commit(first: int, count: int, entries: bytes, note: bytes) -> bytes:
    """Return one commit's bytes."""
    body = b"".join((_HEADER.pack(_MAGIC, first, count, len(entries), len(note)), entries, note))
    return body + _CRC.pack(zlib.crc32(body))


def read_segment_line(file: BinaryIO, origin: str, first: int) -> int:
    """Check the first line and return where the commits begin.

    Raises:
        JournalError: Another origin, index or version; torn if the file ends inside the line.
    """
    expected = segment_line(origin, first)
    line = file.readline(_MAX_LINE_BYTES)
    if line != expected:
        is_torn = expected.startswith(line.rstrip(b"\x00")) and not file.read(1)
        raise JournalError(
            "The segment's first line is not that of this log.",
            index=first,
            offset=0,
            torn_bytes=max(1, len(line)) if is_torn else 0,
        )
    return len(line)


def read_commits(file: BinaryIO, index: int) -> Iterator[Commit]:
    """Yield the commits of a segment from the file's position; the first entry expected is `index`.

    Zeros after the last commit are room that the writer has reserved, and end the walk.

    Raises:
        JournalError: Damage; `torn_bytes` tells a torn tail from damage before other commits.
    """
    offset = file.tell()
    end_of_file = file.seek(0, 2)
    file.seek(offset)
    while offset < end_of_file:
        header = file.read(_HEADER.size)
        if not any(header) and not (torn := _end_of_data(file, offset) - offset):
            return
        fields = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
        magic, first, count, entries_bytes, note_bytes = fields
        end = offset + _HEADER.size + entries_bytes + note_bytes + _CRC.size
        is_sane = (
            magic == _MAGIC
            and first == index
            and count > 0
            and entries_bytes <= MAX_COMMIT_BYTES
            and note_bytes <= MAX_NOTE_BYTES
        )
        if not is_sane or end > end_of_file:
            torn = _end_of_data(file, offset) - offset
            is_torn = _is_torn(header, index, torn) and not _holds_commit(file, offset + 1, torn)
            raise JournalError(
                "A commit is cut short." if is_torn else "A commit's header is damaged.",
                index=index,
                offset=offset,
                torn_bytes=torn if is_torn else 0,
            )
        body = file.read(entries_bytes + note_bytes)
        (crc,) = _CRC.unpack(file.read(_CRC.size))
        if zlib.crc32(body, zlib.crc32(header)) != crc:
            torn = _end_of_data(file, offset) - offset
            raise JournalError(
                "A commit's checksum is wrong.",
                index=index,
                offset=offset,
                torn_bytes=torn if torn <= end - offset and not _holds_commit(file, offset + 1, torn) else 0,
            )
        yield Commit(first, count, body[:entries_bytes], body[entries_bytes:], offset, end)
        index, offset = first + count, end


def _is_torn(header: bytes, index: int, torn_bytes: int) -> bool:
    """Whether the bytes from here on can be one write that did not finish: its start whole, or never written."""
    if torn_bytes > _HEADER.size + MAX_COMMIT_BYTES + MAX_NOTE_BYTES + _CRC.size:
        return False
    expected = _HEADER.pack(_MAGIC, index, 0, 0, 0)[:12]
    start = header[:12].rstrip(b"\x00")
    return expected.startswith(start) or not start


def _holds_commit(file: BinaryIO, offset: int, length: int) -> bool:
    """Whether a whole commit lies in that stretch: then what comes before it is damage, not a torn last write."""
    file.seek(offset)
    data = file.read(length)
    at = data.find(_MAGIC)
    while at >= 0:
        if at + _HEADER.size <= len(data):
            _, _, _, entries_bytes, note_bytes = _HEADER.unpack_from(data, at)
            end = at + _HEADER.size + entries_bytes + note_bytes
            if end + _CRC.size <= len(data) and zlib.crc32(data[at:end]) == _CRC.unpack_from(data, end)[0]:
                return True
        at = data.find(_MAGIC, at + 1)
    return False


def _end_of_data(file: BinaryIO, offset: int) -> int:
    """Return the offset after the last byte at or after `offset` that is not zero; leaves the position anywhere."""
    end = file.seek(0, 2)
    while end > offset:
        start = max(offset, end - (1 << 16))
        file.seek(start)
        kept = file.read(end - start).rstrip(b"\x00")
        if kept:
            return start + len(kept)
        end = start
    return offset


def read_damaged_entries(file: BinaryIO) -> list[bytes]:
    """Return what entries can still be told apart in the commit at the file's position, to find the one at fault."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return []
    _, _, count, entries_bytes, _ = _HEADER.unpack(header)
    data = file.read(min(entries_bytes, MAX_COMMIT_BYTES))
    entries: list[bytes] = []
    at = 0
    while at + 2 <= len(data) and len(entries) < count:
        stop = at + 2 + (data[at] << 8 | data[at + 1])
        entries.append(data[at + 2 : stop] if stop <= len(data) else b"")  # a length that leads out is no entry
        at = stop
    return entries
