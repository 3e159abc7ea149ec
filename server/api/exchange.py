"""One HTTP exchange with a model: credentials and body in, the pipeline's answer out, plain or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from starlette.responses import Response
from typing_extensions import override

from server.api.body import Body, ClientDisconnectedError, parse_json_object
from server.api.problems import describe
from server.errors import UnavailableError
from server.pipeline import Call
from server.types import Client, Credentials, RequestId, Secret

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import Receive, Scope, Send

    from server.api.problems import Problem
    from server.api.protocol import Peer
    from server.api.wire import Format, Reply
    from server.obs.metrics import Metrics
    from server.pipeline import Pipeline
    from server.settings import ListenerSettings
    from server.types import Delta, ModelRequest

_CREDENTIAL_HEADERS = (b"authorization", b"x-api-key", b"api-key")
MAX_CREDENTIAL_CHARS = 16 * 1024
END_S = 5.0
"""How long an exchange that is told to end may take to write its error event and its record."""


def read_credentials(scope: Scope) -> Credentials:
    """Return what the caller offered: one value, wherever it stands; two different ones are malformed.

    `Authorization: Bearer`, `x-api-key` and `api-key` are read; an empty one counts as absent, for some clients always
    send all three. Query parameters and cookies are never read.
    """
    values: list[str] = []
    seen: set[bytes] = set()
    malformed: str | None = None
    for name, raw in scope["headers"]:
        if name not in _CREDENTIAL_HEADERS:
            continue
        if name in seen:
            malformed = f"{name.decode()} sent twice"
        seen.add(name)
        if len(raw) > MAX_CREDENTIAL_CHARS:
            malformed = f"{name.decode()} is too long"
            continue
        value = raw.decode("latin-1").strip()
        if name == b"authorization" and value:
            scheme, _, value = value.partition(" ")
            value = value.strip()
            if scheme.lower() != "bearer":
                malformed = "authorization is not Bearer"
                continue
        if value and value not in values:
            values.append(value)
    if len(values) > 1:
        malformed = "two different credentials"
    certificate = scope.get("extensions", {}).get("tls", {}).get("client_cert_der")
    return Credentials(tuple(Secret(value) for value in values), malformed, certificate)


def read_data_class(scope: Scope) -> str | None:
    """Return the class that the caller gives its data, for policy to judge; sent twice, it is a class of no name."""
    found = [raw for name, raw in scope["headers"] if name == b"x-data-classification"]
    if not found:
        return None
    return found[0].decode("latin-1")[:64] if len(found) == 1 else "ambiguous"


def read_client(scope: Scope) -> Client:
    """Return where the request came from."""
    agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
    peer = scope.get("client")
    return Client(address=peer[0] if peer else "local", user_agent=agent[:256].decode("latin-1"))


class Keeper(Protocol):
    """Keeps answers for later requests; what it raises ends the exchange as any other error does."""

    async def resume(self, request: ModelRequest, call: Call) -> ModelRequest:
        """Return the request with the conversation that it follows."""
        ...

    def begin(self, reply: Reply, call: Call) -> None:
        """Tell the reply, before its first byte, whether it will be kept."""
        ...

    async def keep(self, reply: Reply, call: Call) -> None:
        """Keep the whole answer, before the bytes that say so are sent."""
        ...


class Traffic:
    """The exchanges that run now, so that a stop can wait for them and then end them with a word.

    Args:
        pipeline: The data path.
        limits: Sizes and time-outs of the listener.
        metrics: Where requests are counted.
    """

    def __init__(self, pipeline: Pipeline, limits: ListenerSettings, metrics: Metrics) -> None:
        self.pipeline = pipeline
        self.limits = limits
        self.metrics = metrics
        self.draining = False
        self.running: set[Exchange] = set()

    async def drain(self, limit_s: float) -> None:
        """Refuse new work, wait for what runs, then end what is left with an error event."""
        self.draining = True
        await self._wait(limit_s)
        for exchange in list(self.running):
            exchange.end()
        await self._wait(END_S)

    async def _wait(self, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while self.running and time.monotonic() < deadline_s:  # noqa: ASYNC110 - once, at a stop
            await asyncio.sleep(0.05)


class Exchange(Response):
    """The response object of a model route: it runs the pipeline while it writes.

    Args:
        fmt: The wire format.
        route: The route's path template, as it stands in the audit record and the metrics.
        traffic: The pipeline, limits and metrics, and where this exchange is known while it runs.
        keeper: Keeps answers that a later request may go on from; None where the format knows no such thing.
    """

    def __init__(self, fmt: Format, route: str, traffic: Traffic, keeper: Keeper | None = None) -> None:
        self.background = None
        self.status_code = 200
        self._format = fmt
        self._route = route
        self._traffic = traffic
        self._keeper = keeper
        self._pipeline = traffic.pipeline
        self._limits = traffic.limits
        self._metrics = traffic.metrics
        self._task: asyncio.Task[object] | None = None
        self._reply: Reply | None = None
        self._client_left = False
        self._ended = False

    def end(self) -> None:
        """End the exchange because the server stops; the client gets an error event."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange."""
        started_s = time.perf_counter()
        request_id = RequestId(scope["request_id"])
        peer: Peer = scope["peer"]
        body = Body(scope, receive, max_bytes=self._limits.max_body_bytes, timeout_s=self._limits.body_timeout_s)

        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - ASGI servers run each request in a task

        async def read(call: Call) -> ModelRequest:
            try:
                data = await body.read()
            except ClientDisconnectedError:  # as one who leaves later, whom `_leave` hears of
                self._client_left = True
                raise asyncio.CancelledError from None
            peer.watch(self._leave)
            request = self._format.parse(parse_json_object(data))
            data_class = read_data_class(scope)
            if data_class is not None:
                request = replace(request, classification=data_class)
            return request if self._keeper is None else await self._keeper.resume(request, call)

        call = Call(
            request_id,
            self._format.wire_format,
            self._route,
            self._format.action,
            read_credentials(scope),
            read_client(scope),
            read,
        )
        writer = _Writer(send, peer, self._limits.write_timeout_s)
        self._task = task
        self._traffic.running.add(self)
        try:
            if self._traffic.draining:
                raise UnavailableError("The server is stopping; send the request again in a moment.")
            async with aclosing(self._pipeline.run(call)) as answer:
                first = await anext(answer)
                assert call.request is not None  # noqa: S101 - set before the first list
                reply = self._reply = self._format.reply(call.request, request_id, int(time.time()))
                if self._keeper is not None:
                    self._keeper.begin(reply, call)
                self._metrics.first_token(call, time.perf_counter() - started_s)
                if call.request.stream:
                    await self._stream(answer, first, reply, call, writer)
                else:
                    deltas = list(first)
                    async for batch in answer:
                        deltas += batch
                    data = reply.whole(deltas, call.outcome)
                    if self._keeper is not None:
                        await self._keeper.keep(reply, call)
                    await writer.whole(200, data, call.headers)
        except _ClientTooSlowError:
            call.outcome.status = "aborted"
        except asyncio.CancelledError:
            if self._ended:
                task.uncancel()
                stopping = UnavailableError("The server is stopping; send the request again in a moment.")
                await self._fail(describe(stopping), request_id, call, body, writer)
            elif self._client_left:
                task.uncancel()
                call.outcome.status = "aborted"
            else:
                raise
        except Exception as err:  # noqa: BLE001 - the request boundary: nothing but a problem leaves it
            problem = describe(err)
            await self._fail(problem, request_id, call, body, writer)
        finally:
            self._traffic.running.discard(self)
            peer.watch(None)
            self._metrics.finished(call, writer.status, time.perf_counter() - started_s)

    def _leave(self) -> None:
        self._client_left = True
        if self._task is not None:
            self._task.cancel()

    async def _stream(
        self, answer: AsyncGenerator[list[Delta], None], first: list[Delta], reply: Reply, call: Call, writer: _Writer
    ) -> None:
        await writer.start_stream(call.headers)
        pending = reply.begin(call.prompt_tokens)
        heartbeat = _Heartbeat(writer, reply.heartbeat(), self._limits.heartbeat_s)
        batch = first
        try:
            while not call.is_whole:
                await writer.write(pending + reply.events(batch))
                pending = b""
                batch = await anext(answer)
        finally:
            heartbeat.stop()
        pending += reply.end(batch, call.outcome)
        if self._keeper is not None:
            await self._keeper.keep(reply, call)
        await writer.write(pending, last=True)

    async def _fail(self, problem: Problem, request_id: str, call: Call, body: Body, writer: _Writer) -> None:
        call.outcome.error_code = problem.code
        if writer.status:
            assert self._reply is not None  # noqa: S101 - a stream has begun
            try:
                await writer.write(self._reply.error(problem), last=True)
            except _ClientTooSlowError:
                return
            return
        headers = {**call.headers, **problem.headers}
        if not body.complete and not await body.discard():
            headers["connection"] = "close"
        await writer.whole(problem.status, self._format.problem(problem, request_id), headers)


class _ClientTooSlowError(Exception):
    """The client did not read in time; its answer is given up."""


class _Writer:
    """Writes to the client, never waiting longer than `timeout_s` for it to read."""

    def __init__(self, send: Send, peer: Peer, timeout_s: float) -> None:
        self._send = send
        self._peer = peer
        self._timeout_s = timeout_s
        self.status = 0
        self.last_write_s = time.monotonic()

    async def whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send a plain body."""
        self.status = status
        self._peer.hold_head()
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", b"application/json; charset=utf-8"),
                    (b"content-length", str(len(body)).encode()),
                    *((name.encode(), value.encode()) for name, value in headers.items()),
                ],
            }
        )
        await self.write(body, last=True)

    async def start_stream(self, headers: dict[str, str]) -> None:
        """Send the head of an event stream; it leaves with the first event."""
        self.status = 200
        self._peer.hold_head()
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"x-accel-buffering", b"no"),
                    *((name.encode(), value.encode()) for name, value in headers.items()),
                ],
            }
        )

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a piece of the body."""
        self.last_write_s = time.monotonic()
        if self._peer.is_reading:
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        except TimeoutError as err:
            raise _ClientTooSlowError from err


class _Heartbeat:
    """Sends `data` whenever the stream has been silent for `interval_s`."""

    def __init__(self, writer: _Writer, data: bytes, interval_s: float) -> None:
        self._writer = writer
        self._data = data
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._sending: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if data:
            self._timer = self._loop.call_later(interval_s, self._fire)

    def _fire(self) -> None:
        silent_s = time.monotonic() - self._writer.last_write_s
        if silent_s >= self._interval_s:
            self._sending = self._loop.create_task(self._beat())
            silent_s = 0.0
        self._timer = self._loop.call_later(self._interval_s - silent_s, self._fire)

    async def _beat(self) -> None:
        with contextlib.suppress(_ClientTooSlowError):  # the next real write meets the same client, and ends it
            await self._writer.write(self._data)

    def stop(self) -> None:
        """Send no more."""
        if self._timer is not None:
            self._timer.cancel()
