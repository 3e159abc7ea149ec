"""Reads a live log from its end, or from any entry on, without the writer."""

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


def read_commits_from(directory: Path, index: int) -> Iterator[Commit]:
    """Yield the durable commits that hold entry `index` or later ones, up to the journal's present end.

    Raises:
        TileError: The journal is damaged before its last commit.
    """
    segments = journal.list_segments(directory)
    for number, (first, path) in enumerate(segments):
        if number + 1 < len(segments) and segments[number + 1][0] <= index:
            continue
        with path.open("rb") as file:
            file.readline(1024)
            try:
                for commit in journal.read_commits(file, first):
                    if commit.first + commit.count > index:
                        yield commit
            except JournalError as err:
                if not err.torn_bytes:  # at the end: the writer is in the middle of it
                    raise TileError(f"{path.name}: {err}") from err


def entries_from(directory: Path, index: int) -> Iterator[tuple[int, bytes]]:
    """Yield (index, entry) from `index` on, up to the journal's present end."""
    for commit in read_commits_from(directory, index):
        for at, entry in enumerate(split_entries(commit.entries), commit.first):
            if at >= index:
                yield at, entry


def journal_size(directory: Path) -> int:
    """Return how many entries the log has, pruned ones included."""
    segments = journal.list_segments(directory)
    size = segments[-1][0] if segments else 0
    for commit in read_commits_from(directory, size):
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
    at = journal_size(directory) if index is None else index
    while True:
        for found, entry in entries_from(directory, at):
            yield found, entry
            at = found + 1
        sleep(_POLL_S)
