"""A child's output to its log file, without the texts that callers sent.

vLLM logs tracebacks, and libraries under it write to stderr, with parts of a request in them (the pattern of a JSON
schema that could not be compiled, for one). Until the engine listens no caller has sent anything, and all is kept:
there an operator looks for the reason of a failed start. After that only vLLM's own INFO lines stay whole; of warnings,
errors and tracebacks stay the frames and the kinds of exceptions.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAX_LOG_BYTES = 16 * 1024 * 1024
MAX_LINE_BYTES = 64 * 1024
READ_BYTES = 64 * 1024

# uvicorn says so before it listens, hence before anybody can have sent a text.
_LISTENS = b"Application startup complete"
_RECORD = re.compile(rb"(?:\(\S+ pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[\w.]+:\d+\] ?")
_FRAME = re.compile(rb'  File "[^"]+", line \d+, in [\w.<>]+')
_KIND = re.compile(rb"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)(?=:|$)")


class LineFilter:
    """What of each line may be kept."""

    def __init__(self) -> None:
        self._discreet = False
        self._num_withheld = 0

    def keep(self, line: bytes) -> bytes:
        """Return what is to be written for a line without its end; empty for nothing."""
        if not self._discreet:
            self._discreet = _LISTENS in line
            return line + b"\n"
        kept = _kept_part(line)
        if kept is None:
            self._num_withheld += 1
            return b""
        note = b"(%d lines withheld)\n" % self._num_withheld if self._num_withheld else b""
        self._num_withheld = 0
        return note + kept + b"\n"


def _kept_part(line: bytes) -> bytes | None:
    record = _RECORD.match(line)
    if record is None:
        return None
    if record[1] == b"INFO":
        return line
    rest = line[record.end() :]
    part = _FRAME.fullmatch(rest) or _KIND.match(rest)
    return record[0] + part[0] if part is not None else None


class ChildLog:
    """The reading end of a child's output, and its file; the file is turned over at a size limit.

    Args:
        path: The file; made with mode 0600. The one before it is kept as `.1`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._filter = LineFilter()
        self._rest = b""
        self._reader = -1
        self._file = -1
        self._num_bytes = 0

    def open(self) -> int:
        """Return the descriptor that the child writes to; the caller closes its own copy of it."""
        self._open_file()
        self._reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        asyncio.get_running_loop().add_reader(self._reader, self._on_readable)
        return writer

    def close(self) -> None:
        """Read what is left and close; the child is dead."""
        while self._reader >= 0 and self._on_readable():
            pass
        self._end()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _on_readable(self) -> bool:
        """Take what is there; False if that was all."""
        try:
            data = os.read(self._reader, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._end()
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        self._write(b"".join(map(self._filter.keep, lines)))
        return True

    def _end(self) -> None:
        if self._reader < 0:
            return
        asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)
        self._reader = -1
        if self._rest:
            self._write(self._filter.keep(self._rest))
            self._rest = b""

    def _write(self, data: bytes) -> None:
        if not data or self._file < 0:
            return
        if self._num_bytes + len(data) > MAX_LOG_BYTES:
            os.close(self._file)
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._open_file()
        try:
            os.write(self._file, data)
        except OSError:  # a full disk must stop neither the child nor the supervisor
            return
        self._num_bytes += len(data)

    def _open_file(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(self._path, flags, 0o600)
        self._num_bytes = os.fstat(self._file).st_size
