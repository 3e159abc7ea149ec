"""A lean HTTP/1.1 client for one engine: pooled connections, bodies read as they come, abort by closing.

Written by hand because of cost: see `benchmarks/engine_client.py` for what aiohttp spends on the same request.
It speaks only what an engine needs: GET, or POST with a whole body, and a response with a length or in chunks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import httptools
from typing_extensions import override

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

MAX_HEAD_BYTES = 64 * 1024
MAX_BUFFERED_BYTES = 1024 * 1024  # beyond it reading pauses: a slow caller must not fill our memory
FIRST_FINAL_STATUS = 200
MAX_IDLE_S = 4.0  # uvicorn closes an idle connection after 5 s; we give it up first


class TransportError(Exception):
    """The connection failed.

    Args:
        message: What happened, in our words.
        answered: Whether a byte of the response had arrived.
    """

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens: a unix socket's path, or host and port, with TLS where `tls` is given."""

    path: str | None = None
    host: str = "localhost"
    port: int = 0
    tls: ssl.SSLContext | None = None

    @property
    def authority(self) -> str:
        """What goes into the `Host` header."""
        if self.path is not None:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of one exchange. `first_byte_s` covers the engine's queue and its prefill."""

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    stall_s: float = 120.0


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.status = 0
        self.complete = False
        self.closed = False
        self.idle_since_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser | None = None
        self._chunks: list[bytes] = []
        self._buffered_bytes = 0
        self._head_bytes = 0
        self._started = False
        self._headed = False
        self._keep_alive = False
        self._paused = False
        self._failure = ""  # and no error: one that is raised holds the frames that hold this connection
        self._waiter: asyncio.Future[None] | None = None
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # --- asyncio.Protocol ---

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        if self._parser is None:  # bytes that nobody asked for
            self.abort()
            return
        self._started = True
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("The engine sent a response that is not HTTP.")
            return
        if not self._headed and self._head_bytes > MAX_HEAD_BYTES:
            self._fail("The engine sent response headers beyond the limit.")
            return
        if self._buffered_bytes > MAX_BUFFERED_BYTES and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._parser is not None and not self.complete:
            # A body without a length ends with the connection; httptools can't tell, so it counts as cut off.
            self._fail("The engine closed the connection.")
        self._wake()

    # --- httptools callbacks ---

    def on_message_begin(self) -> None:
        """A second response to one request is a broken peer; nothing of it may reach the next exchange."""
        if self.complete:
            self.abort()

    def on_headers_complete(self) -> None:
        """Keep what the head says."""
        if self._parser is None or self.complete:
            return
        self.status = self._parser.get_status_code()
        self._headed = self.status >= FIRST_FINAL_STATUS
        self._keep_alive = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Collect; `read` hands out all that one wake-up found."""
        if not self.complete:
            self._chunks.append(body)
            self._buffered_bytes += len(body)

    def on_message_complete(self) -> None:
        """The exchange is whole; an interim response (1xx) is not the end of it."""
        self.complete = self._headed

    # --- the exchange ---

    def send(self, request: bytes) -> None:
        """Write one whole request and get ready for its response."""
        if self.transport is None or self.closed:
            raise TransportError("The connection to the engine is closed.", answered=False)
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.complete = self._started = self._headed = self._keep_alive = False
        self._head_bytes = 0
        self.transport.write(request)

    async def read(self, limit_s: float) -> bytes:
        """Return what has arrived since the last call, waiting for it; empty at the end of the body.

        Raises:
            TransportError: The connection broke, or nothing came for `limit_s`.
        """
        while not self._chunks:
            if self._failure:
                raise TransportError(self._failure, answered=self._started)
            if self.complete:
                return b""
            await self._wait(limit_s)
        chunks = self._chunks
        self._chunks = []
        self._buffered_bytes = 0
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def head(self, limit_s: float) -> int:
        """Return the status once the head is there.

        Raises:
            TransportError: The connection broke, or nothing came for `limit_s`.
        """
        while not self._headed:
            if self._failure:
                raise TransportError(self._failure, answered=self._started)
            await self._wait(limit_s)
        return self.status

    def is_reusable(self, now_s: float) -> bool:
        """Whether another exchange may use this connection."""
        return not self.closed and now_s - self.idle_since_s < MAX_IDLE_S

    def finish(self) -> bool:
        """End the exchange; True if the connection may serve another one, otherwise it is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reusable = self.complete and self._keep_alive and not self.closed and not self._chunks and not self._failure
        self._parser = None
        self._waiter = None
        if not reusable:
            self.abort()
        self.idle_since_s = self._loop.time()
        return reusable

    def abort(self) -> None:
        """Close at once; the engine stops what it does for us."""
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    # --- inside ---

    async def _wait(self, limit_s: float) -> None:
        self._waiter = self._loop.create_future()
        # One timer a connection, moved lazily: `asyncio.wait_for` a read would cost more than parsing what was read.
        self._deadline_s = self._loop.time() + limit_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline_s, self._on_timer)
        elif self._timer.when() > self._deadline_s:
            self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline_s, self._on_timer)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _on_timer(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._deadline_s:
            self._timer = self._loop.call_at(self._deadline_s, self._on_timer)
            return
        self._fail("The engine sent nothing for too long.")

    def _fail(self, message: str) -> None:
        self._failure = self._failure or message
        self.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pool:
    """Connections to one address; idle ones are used again, youngest first.

    Args:
        address: Where the engine listens.
        timeouts: Bounds of one exchange.
        headers: Further header lines for every request (an API key of a remote engine).
        on_connect: Called before each new connection; raises to refuse it.
    """

    def __init__(
        self,
        address: Address,
        timeouts: Timeouts,
        *,
        headers: tuple[tuple[str, str], ...] = (),
        on_connect: Callable[[], None] | None = None,
    ) -> None:
        self._address = address
        self._timeouts = timeouts
        self._on_connect = on_connect
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers)
        self._fixed_head = f"host: {address.authority}\r\naccept: application/json\r\n{extra}".encode("latin-1")
        self._idle: list[Connection] = []

    async def open(self, method: str, path: str, body: bytes = b"") -> Connection:
        """Send a request; the caller reads the connection and must `release` it, whatever happens.

        Raises:
            TransportError: No connection.
        """
        request = b"%b %b HTTP/1.1\r\n%b" % (method.encode(), path.encode(), self._fixed_head)
        if body:
            request += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        else:
            request += b"\r\n"
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable(now_s):
                connection.send(request)
                return connection
            connection.abort()
        connection = await self._connect()
        connection.send(request)
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back; one whose response is not whole is closed, which aborts the request."""
        if connection.finish():
            self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    async def _connect(self) -> Connection:
        if self._on_connect is not None:
            self._on_connect()
        loop = asyncio.get_running_loop()
        address = self._address
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                if address.path is not None:
                    _, connection = await loop.create_unix_connection(Connection, address.path)
                else:
                    _, connection = await loop.create_connection(
                        Connection, address.host, address.port, ssl=address.tls
                    )
        except (OSError, TimeoutError) as err:
            raise TransportError("No connection to the engine.", answered=False) from err
        return connection
