"""How other processes append to the audit log: over the writer's socket, returning when the entry is durable."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from typing_extensions import override

from server.audit.entry import encode_entry
from server.audit.writer_protocol import ACK, DURABLE, LENGTH, MAX_MESSAGE_BYTES, UNAVAILABLE
from server.errors import AuditUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_ANSWER_S: Final = 10.0
_CONNECT_S: Final = 1.0
_POLL_S: Final = 0.0004
"""How long the loop looks for the writer's answer before it sleeps.

A core that has gone to sleep needs 20 to 50 µs to wake, on a virtual machine more: a third of what a fast disk takes
for a sync, and it comes twice a request."""
_NUM_UNPOLLED: Final = 256
"""How many appends are waited for asleep after one that took longer than `_POLL_S`: a slow disk is not worth a core."""


def _unavailable(why: str) -> AuditUnavailableError:
    return AuditUnavailableError(f"The audit log can't be written ({why}), so nothing is answered. Try again shortly.")


def _failure(status: int) -> AuditUnavailableError:
    if status == UNAVAILABLE:
        return _unavailable("its disk or its signing key refuses")
    refused = _unavailable("the writer refused the entry: its request is not open in the log")
    refused.is_refusal = True
    return refused


class _Link(asyncio.Protocol):
    """One connection to the writer: batches what one loop tick appends, matches answers to it in order."""

    def __init__(self, on_lost: Callable[[_Link], None], answer_s: float) -> None:
        self._on_lost = on_lost
        self._answer_s = answer_s
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._num_sent = 0
        self._num_answered = 0
        self.is_late = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._partial = b""
        self._poll_until_s = 0.0
        self._is_polling = False
        self._num_unpolled = 0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, entry: bytes) -> asyncio.Future[int]:
        """Queue an entry for this tick's message; the future has its index once it is durable."""
        future: asyncio.Future[int] = self._loop.create_future()
        size = len(entry) + 2
        if self._batch_bytes + size > MAX_MESSAGE_BYTES:
            self._flush()
        is_alone = not self._waiting
        if not self._batch and not is_alone:
            self._loop.call_soon(self._flush)
        self._batch.append(len(entry).to_bytes(2, "big"))
        self._batch.append(entry)
        self._batch_bytes += size
        self._waiting.append(future)
        if is_alone:  # the writer has nothing to do; the next ones wait for each other while it syncs this one
            self._flush()
        self._num_sent += 1
        if self._watchdog is None:
            self._watch()
        if self._num_unpolled:
            self._num_unpolled -= 1
        elif not self._is_polling:
            self._is_polling = True
            self._poll_until_s = time.perf_counter() + _POLL_S
            self._loop.call_soon(self._poll)
        return future

    def _poll(self) -> None:
        """Keep the loop awake while an answer may come any moment; it still serves whatever else arrives."""
        if not self._waiting:
            self._is_polling = False
        elif time.perf_counter() < self._poll_until_s:
            self._loop.call_soon(self._poll)
        else:
            self._is_polling, self._num_unpolled = False, _NUM_UNPOLLED

    def _watch(self) -> None:
        """Look again when what has been sent by now must have been answered; one timer for all of it."""
        self._watchdog = self._loop.call_later(self._answer_s, self._check, self._num_sent)

    def _check(self, num_sent: int) -> None:
        late = num_sent - self._num_answered
        self.is_late = late > 0
        for future in islice(self._waiting, max(0, late)):
            if not future.done():
                future.set_exception(_unavailable("it gave no answer in time"))
        self._watchdog = None
        if self._waiting:
            self._watch()

    def _flush(self) -> None:
        if self._batch and self._transport is not None:
            self._transport.write(b"".join((LENGTH.pack(self._batch_bytes), *self._batch)))
            self._batch.clear()
            self._batch_bytes = 0

    @override
    def data_received(self, data: bytes) -> None:
        if self._partial:
            data = self._partial + data
        at, end, waiting = 0, len(data), self._waiting
        self.is_late = False
        while at + ACK.size <= end:
            status, first, count = ACK.unpack_from(data, at)
            at += ACK.size
            for index in range(first, first + count):
                future = waiting.popleft()
                self._num_answered += 1
                if future.done():  # its caller was cancelled or gave up; the entry is in the log all the same
                    continue
                if status == DURABLE:
                    future.set_result(index)
                else:
                    future.set_exception(_failure(status))
        self._partial = data[at:]

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._batch.clear()
        if self._watchdog is not None:
            self._watchdog.cancel()
        for future in self._waiting:
            if not future.done():
                future.set_exception(_unavailable("its writer went away"))
        self._waiting.clear()
        self._on_lost(self)

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()


class AuditClient:
    """Appends from an asyncio process. Implements `ports.AuditAppender`.

    Nothing is ever sent twice: an entry whose answer was lost with the connection may or may not be in the log, and its
    caller is told that the log is unavailable.

    Args:
        path: The writer's socket.
        answer_s: After how long without an answer an append has failed, at the latest after twice that.
    """

    def __init__(self, path: Path, *, answer_s: float = _ANSWER_S) -> None:
        self._path = str(path)
        self._answer_s = answer_s
        self._link: _Link | None = None
        self._connecting: asyncio.Task[_Link] | None = None
        self._tasks: set[asyncio.Task[int]] = set()

    async def append(self, entry: dict[str, Any]) -> int:
        """Return the entry's index in the log, once it is durable; it goes there even if the caller is cancelled.

        Raises:
            AuditUnavailableError: No writer, a disk that refuses, or no answer in time.
            EntryError: The entry can't be one; a bug of the caller.
        """
        return await self.submit(entry)

    def submit(self, entry: dict[str, Any]) -> asyncio.Future[int]:
        """Send an entry; the future has its index once it is durable, or what `append` raises.

        Raises:
            AuditUnavailableError: The writer gives no answer to what it was sent before.
            EntryError: The entry can't be one; a bug of the caller.
        """
        data = encode_entry(entry)
        if self._link is not None:
            return self._send(self._link, data)
        task = asyncio.create_task(self._connect_and_send(data))
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return asyncio.shield(task)

    async def _connect_and_send(self, data: bytes) -> int:
        return await self._send(await self._connect(), data)

    @staticmethod
    def _send(link: _Link, data: bytes) -> asyncio.Future[int]:
        if link.is_late:  # whoever waits already waited in vain; more would only fill memory
            raise _unavailable("its writer gives no answer")
        return link.send(data)

    def _settled(self, task: asyncio.Task[int]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever still waits gets it too, and a caller that left has nobody to tell

    async def _connect(self) -> _Link:
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._open())
        try:
            # Shielded: many appends wait for one connection, and one cancelled request must not take it from the rest.
            return await asyncio.shield(self._connecting)
        except (OSError, TimeoutError) as err:
            raise _unavailable("its writer does not answer") from err

    async def _open(self) -> _Link:
        try:
            async with asyncio.timeout(_CONNECT_S):
                loop = asyncio.get_running_loop()
                _, link = await loop.create_unix_connection(lambda: _Link(self._lost, self._answer_s), self._path)
            self._link = link
            return link
        finally:
            self._connecting = None

    def _lost(self, link: _Link) -> None:
        if self._link is link:
            self._link = None

    async def is_available(self) -> bool:
        """Whether the writer can be reached; for readiness."""
        try:
            await self._connect() if self._link is None else None
        except AuditUnavailableError:
            return False
        return True

    async def aclose(self) -> None:
        """Send what is queued and close the connection."""
        if self._link is not None:
            self._link.close()
            await asyncio.sleep(0)
            self._link = None


class SyncAuditClient:
    """Appends from a process without a loop: supervisor, key agent, command line.

    Args:
        path: The writer's socket.
        answer_s: After how long without an answer an append has failed.
    """

    def __init__(self, path: Path, *, answer_s: float = _ANSWER_S) -> None:
        self._path = str(path)
        self._answer_s = answer_s
        self._sock: socket.socket | None = None

    def append(self, entry: dict[str, Any]) -> int:
        """Return the entry's index in the log, once it is durable.

        Raises:
            AuditUnavailableError: No writer, a disk that refuses, or no answer in time.
            EntryError: The entry can't be one; a bug of the caller.
        """
        data = encode_entry(entry)
        try:
            sock = self._sock or self._open()
            sock.sendall(LENGTH.pack(len(data) + 2) + len(data).to_bytes(2, "big") + data)
            answer = b""
            while len(answer) < ACK.size:
                piece = sock.recv(ACK.size - len(answer))
                if not piece:
                    raise ConnectionResetError
                answer += piece
        except OSError as err:
            self.close()
            raise _unavailable("its writer does not answer") from err
        status, index, _ = ACK.unpack(answer)
        if status != DURABLE:
            raise _failure(status)
        return int(index)

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self._answer_s)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self._sock = sock
        return sock

    def close(self) -> None:
        """Close the connection; requests that were opened on it are closed as unknown by the writer."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def wait_for_writer(path: Path, *, deadline_s: float) -> None:
    """Return once the writer accepts connections; the supervisor calls it before it starts the others.

    Raises:
        AuditUnavailableError: Not within `deadline_s`.
    """
    end_s = time.monotonic() + deadline_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_CONNECT_S)
            try:
                sock.connect(str(path))
            except OSError as err:
                if time.monotonic() > end_s:
                    raise _unavailable("its writer did not start") from err
            else:
                return
        time.sleep(0.02)
