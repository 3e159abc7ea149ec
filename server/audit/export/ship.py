"""Reads the log and feeds one sink, in order, at least once. The log itself is the spool, so memory stays flat."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Protocol

from server.audit.entry import now
from server.audit.log import sync_folder
from server.audit.tail import Cursor
from server.audit.tiles import split_entries
from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH_BYTES = 256 * 1024
OVERLAP = 4_096
_POLL_S = 0.2
_MAX_WAIT_S = 30.0


class Sink(Protocol):
    """Where entries go."""

    def message(self, index: int, data: bytes) -> bytes:
        """Return an entry as this sink sends it."""
        ...

    def checkpoint_message(self, size: int, note: bytes, now: str) -> bytes:
        """Return a checkpoint as this sink sends it."""
        ...

    def send(self, messages: list[bytes]) -> None:
        """Deliver messages in order.

        Raises:
            OSError: Some may not have arrived; send all of them again.
        """
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def read_cursor(path: Path) -> int:
    """Return the next index that a receiver is to get; 0 where it has got nothing.

    Raises:
        ConfigError: The cursor is damaged.
    """
    if not path.exists():
        return 0
    try:
        return int(json.loads(path.read_text())["index"])
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"The export cursor {path} is damaged; delete it to send the whole log again.") from err


def shipped_up_to(folder: Path) -> int | None:
    """Return how far the slowest receiver whose cursor lies in `folder` has got; None if there is none."""
    return min((read_cursor(path) for path in folder.glob("[!.]*.json")), default=None)


class Shipper:
    """Carries one log to one sink and remembers how far it got.

    After a lost connection it goes back `overlap` entries: a receiver that died may have acknowledged bytes that it
    never read. Each message bears its index, so the second copy of an entry is recognised.

    Args:
        directory: The log.
        sink: The receiver.
        cursor_path: Where the next index is kept; one file a receiver.
        overlap: How many entries are sent again after a failure.
        on_state: Told (is it delayed, next index) when the receiver is lost, and when it has caught up.
        sleep: Waits.
    """

    def __init__(
        self,
        directory: Path,
        sink: Sink,
        cursor_path: Path,
        *,
        overlap: int = OVERLAP,
        on_state: Callable[[bool, int], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._cursor_path = cursor_path
        self._overlap = overlap
        self._on_state = on_state or (lambda _is_delayed, _index: None)
        self._sleep = sleep
        self._stop = False
        self._is_delayed = False
        self._cursor: Cursor | None = None
        self.index = read_cursor(cursor_path)

    def _save(self, index: int) -> None:
        self.index = index
        temporary = self._cursor_path.with_name(f".{self._cursor_path.name}")
        with temporary.open("w") as file:
            file.write(f'{{"index":{index}}}\n')
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._cursor_path)
        sync_folder(self._cursor_path.parent)

    def stop(self) -> None:
        """Make `run` return."""
        self._stop = True

    def run(self, *, once: bool = False) -> None:
        """Ship until stopped, whatever the receiver does.

        Args:
            once: Return when everything that is in the log now has been delivered.
        """
        wait_s = _POLL_S
        self._cursor_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while not self._stop:
            try:
                self._ship()
            except OSError:
                if not self._is_delayed:
                    self._is_delayed = True
                    self._on_state(True, self.index)
                    self.index = max(0, self.index - self._overlap)
                self._cursor = None
                self._sleep(wait_s)
                wait_s = min(wait_s * 2, _MAX_WAIT_S)
                continue
            wait_s = _POLL_S
            if self._is_delayed:
                self._is_delayed = False
                self._on_state(False, self.index)
            if once:
                break
            self._sleep(_POLL_S)
        self._sink.close()

    def _ship(self) -> None:
        """Send everything that the log has by now."""
        if self._cursor is None:
            self._cursor = Cursor(self._directory, self.index)
        wanted, end, note = self.index, 0, b""
        batch: list[bytes] = []
        size_bytes = 0
        for _, commit in self._cursor.read():
            for index, data in enumerate(split_entries(commit.entries), commit.first):
                if index >= wanted:
                    message = self._sink.message(index, data)
                    batch.append(message)
                    size_bytes += len(message)
            end, note = commit.first + commit.count, commit.note
            if size_bytes >= BATCH_BYTES:
                self._deliver(batch, end, note)
                batch, size_bytes = [], 0
                if self._stop:
                    self._cursor = None
                    return
        if batch:
            self._deliver(batch, end, note)

    def _deliver(self, batch: list[bytes], size: int, note: bytes) -> None:
        """Send a batch and the checkpoint that covers it: what a verifier elsewhere holds the log to."""
        self._sink.send([*batch, self._sink.checkpoint_message(size, note, now())])
        self._save(size)
