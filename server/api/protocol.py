"""uvicorn's HTTP protocol with what a public listener needs: header limits in bytes and time, the peer certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

    from server.settings import ListenerSettings

MAX_HEADERS = 128


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
            self._header_timer: asyncio.TimerHandle | None = None
            self._certificate: bytes | None = None
            ssl_object = transport.get_extra_info("ssl_object")
            if ssl_object is not None:
                self._certificate = ssl_object.getpeercert(binary_form=True)
            self._start_header_timer()

        @override
        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_header_timer()
            super().connection_lost(exc)

        @override
        def data_received(self, data: bytes) -> None:
            # A head that is still open has a timer; a new request on a kept connection starts one here.
            cycle: Any = self.cycle  # None before the first request, whatever uvicorn's annotation says
            if self._header_timer is None and (cycle is None or cycle.response_complete):
                self._start_header_timer()
            super().data_received(data)

        @override
        def on_message_begin(self) -> None:
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
            self._stop_header_timer()
            self._head_complete = True
            if self.transport.is_closing():
                return
            super().on_headers_complete()
            if self._certificate is not None:
                self.scope["extensions"] = {"tls": {"client_cert_der": self._certificate}}

        @override
        def on_body(self, body: bytes) -> None:
            if not self.transport.is_closing():
                super().on_body(body)

        @override
        def on_message_complete(self) -> None:
            if not self.transport.is_closing():
                super().on_message_complete()

        @override
        def send_400_response(self, msg: str) -> None:
            self.transport.write(
                _plain_response(400, b"Bad Request", b"invalid_http", b"This is not a valid HTTP/1.1 request.")
            )
            self.transport.close()

        def _count(self, size: int) -> None:
            self._header_bytes += size
            too_large = self._header_bytes > listener.max_header_bytes or self._num_headers > MAX_HEADERS
            if too_large and not self.transport.is_closing():
                self.transport.write(
                    _plain_response(
                        431,
                        b"Request Header Fields Too Large",
                        b"headers_too_large",
                        b"The request line and headers are larger than this server accepts; send less.",
                    )
                )
                self.transport.close()

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
