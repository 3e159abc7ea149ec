"""uvicorn's HTTP protocol with what a public listener needs: header limits in bytes and time, the peer certificate."""

from __future__ import annotations

import re
import weakref
from typing import TYPE_CHECKING, Any

import httptools
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from server.settings import ListenerSettings

MAX_HEADERS = 128

_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%~_-]*\]|[0-9A-Za-z.~_%!$&'()*+,;=-]*)(?::[0-9]*)?")
"""RFC 3986, section 3.2.2, with a port: what may stand in `Host`."""


class Peer:
    """What a request may know of its connection without a task or a timer of its own; `scope["peer"]`."""

    __slots__ = ("_cycle", "_flow", "_watchers")

    def __init__(self, cycle: RequestResponseCycle, watchers: list[Callable[[], None]]) -> None:
        self._cycle = weakref.ref(cycle)  # whose scope holds this
        self._flow = cycle.flow
        self._watchers = watchers

    def watch(self, on_leave: Callable[[], None] | None) -> None:
        """Have `on_leave` called when the connection is lost, in place of what the request before it wanted."""
        self._watchers[:] = () if on_leave is None else (on_leave,)

    def hold_head(self) -> None:
        """Have the head of the answer leave with the first bytes of its body, in one packet; call it before the head.

        Whoever calls it must send a body, so it is not for answers to HEAD.
        """
        cycle = self._cycle()
        if cycle is not None:
            cycle.transport = _HeldHead(cycle.transport)  # type: ignore[assignment]

    @property
    def has_sent_body(self) -> bool:
        """Whether the whole body is here, so that nothing that receives it can wait."""
        cycle = self._cycle()
        return cycle is None or not cycle.more_body

    @property
    def is_reading(self) -> bool:
        """Whether a write would not wait for the client to read."""
        return not self._flow.write_paused


class _HeldHead:
    """Stands for a connection's transport while one request is answered: its first write waits for the second."""

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()


def _plain_response(status: int, reason: bytes, code: bytes, message: bytes) -> bytes:
    """Return a whole response for what never becomes an ASGI request."""
    body = (
        b'{"error":{"message":"' + message + b'","type":"invalid_request_error","param":null,"code":"' + code + b'"}}'
    )
    return (
        b"HTTP/1.1 " + str(status).encode() + b" " + reason + b"\r\n"
        b"content-type: application/json; charset=utf-8\r\ncache-control: no-store\r\n"
        b"x-content-type-options: nosniff\r\nconnection: close\r\n"
        b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )


def protocol_for(listener: ListenerSettings) -> type[HttpToolsProtocol]:
    """Return a protocol class bound to a listener's limits."""

    class LimitedProtocol(HttpToolsProtocol):
        """One connection; uvicorn itself bounds neither the size of headers nor the time they may take."""

        @override
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._header_bytes = 0
            self._num_headers = 0
            self._head_complete = False
            self._is_stuck = False
            self._stuck_bytes = 0
            self._header_timer: asyncio.TimerHandle | None = None
            self._certificate: bytes | None = None
            ssl_object = transport.get_extra_info("ssl_object")
            if ssl_object is not None:
                self._certificate = ssl_object.getpeercert(binary_form=True)
            self._watchers: list[Callable[[], None]] = []  # of the one request that runs; others of a pipeline wait
            self._start_header_timer()

        @override
        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_header_timer()
            super().connection_lost(exc)
            for on_leave in self._watchers:
                on_leave()

        @override
        def data_received(self, data: bytes) -> None:
            self._is_stuck = True  # until the parser finds something whole in it
            self._feed(data)
            # It keeps the unfinished header or trailer for as long as more of it comes, and copies it each time.
            self._stuck_bytes = self._stuck_bytes + len(data) if self._is_stuck else 0
            if self._stuck_bytes > listener.max_header_bytes:
                self._refuse_head()
            # A head that came whole needs no timer. One that is open does, and so do bytes that belong to no request.
            cycle: Any = self.cycle  # None before the first request, whatever uvicorn's annotation says
            if (
                self._header_timer is None
                and (not self._head_complete or cycle is None or cycle.response_complete)
                and not self.transport.is_closing()
            ):
                self._start_header_timer()

        def _feed(self, data: bytes) -> None:
            """Parse; uvicorn's own way with the same name would take the body of a request for the next request.

            The parser stops behind the head where `Upgrade` stands in it, and uvicorn goes on with whatever bytes come
            next: behind a proxy, a caller's body would be answered to somebody else (request smuggling). We upgrade to
            nothing, so RFC 9110 lets us read such a request as if the header were not there; some clients always send
            it.
            """
            self._unset_keepalive_if_required()
            head, rest = b"", memoryview(data)
            while True:
                try:
                    if head:
                        self.parser.feed_data(head)
                    self.parser.feed_data(rest)
                except httptools.HttpParserUpgrade as stopped:
                    if self.scope["method"] == "CONNECT":
                        self.send_400_response("")
                        return
                    head, rest = self._plain_head(), rest[stopped.args[0] :]
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                except httptools.HttpParserError:
                    self.send_400_response("")
                    return
                else:
                    return

        def _plain_head(self) -> bytes:
            """Return the request's head as it was, but for the upgrade."""
            lines = [b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())]
            for name, value in self.headers:
                if name == b"connection":
                    kept = {b"close", b"keep-alive"} & {token.strip() for token in value.lower().split(b",")}
                    lines += [b"connection: " + token for token in kept]
                elif name != b"upgrade":
                    lines.append(b"%b: %b" % (name, value))
            return b"\r\n".join((*lines, b"", b""))

        @override
        def on_message_begin(self) -> None:
            self._is_stuck = False
            self._header_bytes = 0
            self._num_headers = 0
            self._head_complete = False
            super().on_message_begin()

        @override
        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        @override
        def on_header(self, name: bytes, value: bytes) -> None:
            self._num_headers += 1
            self._count(len(name) + len(value))
            # A trailer comes after the body and by the same call; taken for a header it could bring a credential or a
            # data class past a proxy that checked the head.
            if not self._head_complete:
                super().on_header(name, value)

        @override
        def on_headers_complete(self) -> None:
            self._is_stuck = False
            self._stop_header_timer()
            self._head_complete = True
            if self.transport.is_closing():
                return
            # RFC 9112, section 3.2: where two proxies could read it in two ways, nobody answers.
            hosts = [value for name, value in self.headers if name == b"host"]
            is_old = not hosts and self.parser.get_http_version() == "1.0"
            if not is_old and (len(hosts) != 1 or not _HOST.fullmatch(hosts[0])):
                self._refuse(
                    _plain_response(400, b"Bad Request", b"invalid_http", b"Send one Host header, with a host's name.")
                )
                return
            if self.parser.should_upgrade():  # it stops here, and is fed the same head again
                self.scope["method"] = self.parser.get_method().decode()
                self.scope["http_version"] = self.parser.get_http_version()
                return
            super().on_headers_complete()
            scope: dict[str, Any] = self.scope  # type: ignore[assignment]
            scope["peer"] = Peer(self.cycle, self._watchers)
            if self._certificate is not None:
                self.scope["extensions"] = {"tls": {"client_cert_der": self._certificate}}

        @override
        def on_body(self, body: bytes) -> None:
            self._is_stuck = False
            if not self.transport.is_closing():
                super().on_body(body)

        @override
        def on_message_complete(self) -> None:
            self._is_stuck = False
            if not self.transport.is_closing() and not self.parser.should_upgrade():
                super().on_message_complete()

        @override
        def send_400_response(self, msg: str) -> None:
            self._refuse(
                _plain_response(400, b"Bad Request", b"invalid_http", b"This is not a valid HTTP/1.1 request.")
            )

        def _refuse(self, response: bytes) -> None:
            """Answer what never becomes a request of its own, and close."""
            cycle: Any = self.cycle
            is_body = cycle is not None and cycle.more_body and not cycle.response_started and not self.pipeline
            if cycle is None or cycle.response_complete or is_body:
                self.transport.write(response)  # else it would stand in the answer to a request before this one
            self.transport.close()

        def _count(self, size: int) -> None:
            self._is_stuck = False
            self._header_bytes += size
            if self._header_bytes > listener.max_header_bytes or self._num_headers > MAX_HEADERS:
                self._refuse_head()

        def _refuse_head(self) -> None:
            if not self.transport.is_closing():
                self._refuse(
                    _plain_response(
                        431,
                        b"Request Header Fields Too Large",
                        b"headers_too_large",
                        b"The request line and headers are larger than this server accepts; send less.",
                    )
                )

        def _start_header_timer(self) -> None:
            self._header_timer = self.loop.call_later(listener.header_timeout_s, self._head_too_slow)

        def _stop_header_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _head_too_slow(self) -> None:
            self._header_timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return LimitedProtocol
