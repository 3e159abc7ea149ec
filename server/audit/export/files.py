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
            OSError: Nothing of this range stands yet, or all of it; send it again.
        """
        *lines, note = messages
        self._check_mount()
        if lines:
            first, last = (int(line[9 : line.index(b",")]) for line in (lines[0], lines[-1]))
            name = f"{first:020d}-{last:020d}"
            self._write(f"{name}.jsonl", b"".join(lines))
            self._write(f"{name}.checkpoint", note)

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
