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
        at_end: Whether nothing that parses follows: a torn last write looks like this.
    """

    def __init__(self, message: str, *, index: int, offset: int, at_end: bool = False) -> None:
        super().__init__(message)
        self.index = index
        self.offset = offset
        self.at_end = at_end


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
        JournalError: Another origin, index or version; `at_end` if the file ends inside the line.
    """
    expected = segment_line(origin, first)
    line = file.readline(_MAX_LINE_BYTES)
    if line != expected:
        torn = expected.startswith(line) and not file.read(1)
        raise JournalError("The segment's first line is not that of this log.", index=first, offset=0, at_end=torn)
    return len(line)


def read_commits(file: BinaryIO, index: int) -> Iterator[Commit]:
    """Yield the commits of a segment from the file's position; the first entry expected is `index`.

    Raises:
        JournalError: Damage; `at_end` tells a torn tail from damage before other commits.
    """
    offset = file.tell()
    end_of_file = file.seek(0, 2)
    file.seek(offset)
    while offset < end_of_file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise JournalError("The last commit is cut short.", index=index, offset=offset, at_end=True)
        magic, first, count, entries_bytes, note_bytes = _HEADER.unpack(header)
        if magic != _MAGIC or first != index or not count or entries_bytes > MAX_COMMIT_BYTES:
            # All zero to the end is what a file system leaves of a write that never finished.
            torn = not any(header) and _is_zero(file)
            raise JournalError("A commit's header is damaged.", index=index, offset=offset, at_end=torn)
        if note_bytes > MAX_NOTE_BYTES:
            raise JournalError("A commit's note is too long.", index=index, offset=offset)
        end = offset + _HEADER.size + entries_bytes + note_bytes + _CRC.size
        if end > end_of_file:
            raise JournalError("The last commit is cut short.", index=index, offset=offset, at_end=True)
        body = file.read(entries_bytes + note_bytes)
        (crc,) = _CRC.unpack(file.read(_CRC.size))
        if zlib.crc32(body, zlib.crc32(header)) != crc:
            raise JournalError("A commit's checksum is wrong.", index=index, offset=offset, at_end=end == end_of_file)
        yield Commit(first, count, body[:entries_bytes], body[entries_bytes:], offset, end)
        index, offset = first + count, end


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
        entries.append(data[at + 2 : stop])
        at = stop
    return entries


def _is_zero(file: BinaryIO) -> bool:
    while chunk := file.read(1 << 20):
        if any(chunk):
            return False
    return True
