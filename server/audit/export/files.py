"""Files for a write-once store: entries in order, then the checkpoint that covers them; written once, never again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from server.audit.log import sync_folder


class FileSink:
    """A folder, on a WORM mount or watched by something that uploads.

    Args:
        folder: Where the files go.
        origin: The log's origin; not used in names.
    """

    def __init__(self, folder: Path, *, origin: str) -> None:
        self._folder = folder
        self._origin = origin
        self._device: int | None = None
        self._may_stand = True  # what comes next, of a send that was cut off

    def message(self, index: int, data: bytes) -> bytes:
        """Return one entry's line."""
        return b'{"index":%d,"entry":%b}\n' % (index, data)

    def checkpoint_message(self, size: int, note: bytes, now: str) -> bytes:
        """Return a checkpoint as it is."""
        del size, now
        return note

    def send(self, messages: list[bytes]) -> None:
        """Write one file of lines and one checkpoint, named by the range; durable on return.

        Raises:
            OSError: Nothing of this range stands yet, or all its lines; send it again, with what came meanwhile.
        """
        *lines, note = messages
        self._check_mount()
        new = self._not_standing(lines) if lines and self._may_stand else lines
        self._may_stand = True
        if new:
            name = f"{_index(new[0]):020d}-{_index(new[-1]):020d}"
            self._write(f"{name}.jsonl", b"".join(new))
            self._write(f"{name}.checkpoint", note)
        self._may_stand = len(new) < len(lines)  # then so may the next

    def _not_standing(self, lines: list[bytes]) -> list[bytes]:
        """Return the lines behind those that a file holds already: a range sent again has often grown."""
        first = _index(lines[0])
        lasts = [int(path.stem[21:]) for path in self._folder.glob(f"{first:020d}-*.jsonl")]
        return lines[max(lasts, default=first - 1) - first + 1 :]

    def _check_mount(self) -> None:
        """Notice a store that was unmounted: what is written into its empty mount point would not be in the store."""
        self._folder.mkdir(parents=True, exist_ok=True)
        device = self._folder.stat().st_dev
        if self._device is None:
            self._device = device
        elif device != self._device:
            raise OSError(errno.ENODEV, "the folder is on another file system than before")

    def _write(self, name: str, data: bytes) -> None:
        path, temporary = self._folder / name, self._folder / f".{name}"
        if path.exists():  # a WORM store refuses a second write, and the same range is the same bytes
            return
        with Path.open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(self._folder)

    def close(self) -> None:
        """Nothing stays open."""


def _index(line: bytes) -> int:
    return int(line[9 : line.index(b",")])
