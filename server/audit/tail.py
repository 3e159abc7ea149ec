"""Reads a log's journal from any entry on, live or at rest, without the writer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from server.audit import journal
from server.audit.journal import JournalError
from server.audit.tiles import TileError, split_entries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from server.audit.journal import Commit

_POLL_S = 0.2
_MAX_LINE_BYTES = 1_024
_ATTEMPTS = 5
_RETRY_S = 0.02


class Cursor:
    """A place in a journal that moves forward; what has been read is not read again.

    Args:
        directory: The log.
        index: The first entry wanted; entries that were pruned are passed over.
    """

    def __init__(self, directory: Path, index: int = 0) -> None:
        self._directory = directory
        self._segment: Path | None = None
        self._offset = 0
        self._at = 0
        self.index = index

    def read(self) -> Iterator[tuple[Path, Commit]]:
        """Yield (segment, commit) of what has become durable and holds entries from `index` on.

        Raises:
            TileError: The journal is damaged before its last commit.
        """
        while True:
            segments = journal.list_segments(self._directory)
            if self._segment is None:
                if not segments:
                    return
                started = [(first, path) for first, path in segments if first <= self.index] or segments[:1]
                self._enter(*started[-1])
            yield from self._read_segment()
            following = [(first, path) for first, path in segments if first == self._at and path != self._segment]
            if not following:
                return
            self._enter(*following[0])

    def _enter(self, first: int, path: Path) -> None:
        self._segment, self._offset, self._at = path, 0, first

    def _read_segment(self) -> Iterator[tuple[Path, Commit]]:
        """Read on; what looks damaged may be a commit that is being written, so it is looked at more than once."""
        num_failures = 0
        while True:
            before = self._offset
            try:
                yield from self._read_once()
            except JournalError as err:
                if err.torn_bytes:
                    return
                # What was buffered is older than what came after it: behind a slow reader, commits look damaged again
                # and again, and each look gets further. Only a place that stays as it is, is damaged.
                num_failures = 0 if self._offset > before else num_failures + 1
                if num_failures == _ATTEMPTS:
                    raise TileError(f"The journal is damaged at entry {err.index}: {err}") from err
                time.sleep(_RETRY_S if num_failures else 0)
            else:
                return

    def _read_once(self) -> Iterator[tuple[Path, Commit]]:
        assert self._segment is not None  # noqa: S101 - set by `read`
        with self._segment.open("rb") as file:
            if not self._offset:
                line = file.readline(_MAX_LINE_BYTES)
                if not line.endswith(b"\n"):
                    return
                self._offset = len(line)
            file.seek(self._offset)
            for commit in journal.read_commits(file, self._at):
                self._offset, self._at = commit.end, commit.first + commit.count
                if self._at > self.index:
                    yield self._segment, commit
                    self.index = self._at


def entries_from(directory: Path, index: int) -> Iterator[tuple[int, bytes]]:
    """Yield (index, entry) from `index` on, up to the journal's present end."""
    for _, commit in Cursor(directory, index).read():
        for at, entry in enumerate(split_entries(commit.entries), commit.first):
            if at >= index:
                yield at, entry


def journal_size(directory: Path) -> int:
    """Return how many entries the log has, pruned ones included."""
    segments = journal.list_segments(directory)
    size = segments[-1][0] if segments else 0
    for _, commit in Cursor(directory, size).read():
        size = commit.first + commit.count
    return size


def last_entries(directory: Path, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield the newest entries, oldest first."""
    yield from entries_from(directory, max(0, journal_size(directory) - count))


def follow(
    directory: Path, index: int | None = None, *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[tuple[int, bytes]]:
    """Yield entries as they become durable, for ever.

    Args:
        directory: The log.
        index: Where to begin; None for what comes from now on.
        sleep: Waits between looks.
    """
    wanted = journal_size(directory) if index is None else index
    cursor = Cursor(directory, wanted)
    while True:
        for _, commit in cursor.read():
            for at, entry in enumerate(split_entries(commit.entries), commit.first):
                if at >= wanted:
                    yield at, entry
        sleep(_POLL_S)
