"""A proxy without any control: what asynchronous Python costs before Strongroom does anything. A baseline.

    python -m benchmarks.gateway.bare --port 8099 --engine /run/x/engine.sock

Each request is parsed, sent on over a kept connection to the engine; the bytes of its answer are handed back as they
come.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import httptools
import uvloop
from typing_extensions import override


class _Upstream(asyncio.Protocol):
    """One connection to the engine; hands on what it reads and tells when the answer is whole."""

    def __init__(self) -> None:
        self.client: _Client | None = None
        self.transport: Any = None
        self._parser = httptools.HttpResponseParser(self)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        if self.client is not None:
            self.client.transport.write(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        client, self.client = self.client, None
        if client is not None:
            client.answered.set_result(None)


class _Client(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, engine: str, idle: list[_Upstream]) -> None:
        self._engine = engine
        self._idle = idle
        self._body = b""
        self._url = b""
        self._parser = httptools.HttpRequestParser(self)
        self.transport: Any = None
        self.answered: asyncio.Future[None]

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        asyncio.ensure_future(self._answer(self._url, body))  # noqa: RUF006 - ends with the connection at the latest

    async def _answer(self, url: bytes, body: bytes) -> None:
        if self._idle:
            upstream = self._idle.pop()
        else:
            _, upstream = await asyncio.get_running_loop().create_unix_connection(_Upstream, self._engine)
        self.answered = asyncio.get_running_loop().create_future()
        upstream.client = self
        upstream.transport.write(
            b"POST %b HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (url, len(body), body)
        )
        await self.answered
        self._idle.append(upstream)


async def serve(port: int, engine: str) -> None:
    """Serve for ever on 127.0.0.1."""
    idle: list[_Upstream] = []
    server = await asyncio.get_running_loop().create_server(lambda: _Client(engine, idle), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", required=True, help="the engine's unix socket")
    args = parser.parse_args()
    uvloop.run(serve(args.port, args.engine))


if __name__ == "__main__":
    main()
