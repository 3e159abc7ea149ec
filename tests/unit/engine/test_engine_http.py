"""The lean HTTP client against a peer that cuts, pipelines, stalls and lies."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from server.engine import http
from server.engine.http import Address, Connection, Pool, Timeouts, TransportError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

QUICK = Timeouts(connect_s=5.0, first_byte_s=5.0, stall_s=5.0)
OK_CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def peer(folder: Path, script: Script) -> AsyncGenerator[Pool, None]:
    """A pool before a peer that reads one request at a time and then does what `script` says."""
    num_connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                for line in head.split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        await reader.readexactly(int(line.split(b":")[1]))
                await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    path = str(folder / "s")
    server = await asyncio.start_unix_server(handle, path)
    pool = Pool(Address(path=path), QUICK)
    pool.num_seen = lambda: num_connections  # type: ignore[attr-defined]
    try:
        yield pool
    finally:
        pool.close()
        server.close()
        await server.wait_closed()


async def body_of(connection: Connection) -> bytes:
    body = b""
    while chunk := await connection.read(QUICK.stall_s):
        body += chunk
    return body


async def exchange(pool: Pool, body: bytes = b"{}") -> tuple[int, bytes]:
    connection = await pool.open("POST", "/x", body)
    try:
        return await connection.head(QUICK.first_byte_s), await body_of(connection)
    finally:
        pool.release(connection)


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
async def test_chunked_body_cut_anywhere(tmp_path: Path, size: int) -> None:
    raw = OK_CHUNKED + b"5\r\nhello\r\n7;ext=1\r\n, world\r\n0\r\n\r\n"

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(raw), size):
            writer.write(raw[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)

    async with peer(tmp_path, script) as pool:
        for _ in range(3):
            assert await exchange(pool) == (200, b"hello, world")
        assert pool.num_seen() == 1  # type: ignore[attr-defined]


async def test_interim_response_is_not_the_answer(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with peer(tmp_path, script) as pool:
        assert await exchange(pool) == (200, b"ok")


async def test_early_close_is_an_error(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK_CHUNKED + b"5\r\nhello\r\n")
        await writer.drain()
        writer.close()

    async with peer(tmp_path, script) as pool:
        connection = await pool.open("GET", "/x")
        assert await connection.head(1) == 200
        assert await connection.read(1) == b"hello"
        with pytest.raises(TransportError) as caught:
            await connection.read(1)
        assert caught.value.answered
        pool.release(connection)


async def test_close_without_a_byte_is_not_an_answer(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with peer(tmp_path, script) as pool:
        with pytest.raises(TransportError) as caught:
            await exchange(pool)
        assert not caught.value.answered


async def test_leftovers_never_reach_the_next_exchange(tmp_path: Path) -> None:
    """A peer that answers one request twice: its second answer must not become the answer to somebody else."""

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
        writer.write(answer + b"first" + answer + b"other")

    async with peer(tmp_path, script) as pool:
        assert await exchange(pool) == (200, b"first")
        assert await exchange(pool) == (200, b"first")
        assert pool.num_seen() == 2  # type: ignore[attr-defined]


async def test_late_leftovers_close_the_idle_connection(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirst")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother")

    async with peer(tmp_path, script) as pool:
        assert await exchange(pool) == (200, b"first")
        await asyncio.sleep(0.05)
        assert await exchange(pool) == (200, b"first")
        assert pool.num_seen() == 2  # type: ignore[attr-defined]


async def test_stall_is_an_error(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK_CHUNKED + b"5\r\nhello\r\n")
        await asyncio.sleep(30)

    async with peer(tmp_path, script) as pool:
        connection = await pool.open("GET", "/x")
        assert await connection.head(5) == 200  # the longer limit before must not lengthen the stall's
        assert await connection.read(5) == b"hello"
        with pytest.raises(TransportError, match="too long"):
            await connection.read(0.05)
        pool.release(connection)


async def test_release_before_the_end_closes(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK_CHUNKED + b"5\r\nhello\r\n")
        assert await reader.read() == b""
        gone.set()

    async with peer(tmp_path, script) as pool:
        connection = await pool.open("GET", "/x")
        assert await connection.head(1) == 200
        pool.release(connection)
        async with asyncio.timeout(1):
            await gone.wait()


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        OK_CHUNKED + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * http.MAX_HEAD_BYTES + b"\r\n",
    ],
    ids=["not-http", "bad-length", "bad-chunk", "endless-head"],
)
async def test_broken_peer_is_an_error(tmp_path: Path, raw: bytes) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await asyncio.sleep(30)

    async with peer(tmp_path, script) as pool:
        with pytest.raises(TransportError):
            await exchange(pool)


async def test_connection_close_is_obeyed(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")

    async with peer(tmp_path, script) as pool:
        assert await exchange(pool) == (200, b"ok")
        assert await exchange(pool) == (200, b"ok")
        assert pool.num_seen() == 2  # type: ignore[attr-defined]


async def test_idle_connection_that_died_is_not_used(tmp_path: Path) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.close()

    async with peer(tmp_path, script) as pool:
        assert await exchange(pool) == (200, b"ok")
        await asyncio.sleep(0.05)
        assert await exchange(pool) == (200, b"ok")


async def test_a_slow_reader_stops_the_peer(tmp_path: Path) -> None:
    """The buffer is bounded: a caller that does not read must not fill our memory."""
    num_written = 0

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_written
        writer.write(OK_CHUNKED)
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _i in range(200):
            writer.write(piece)
            await writer.drain()
            num_written += 1
        writer.write(b"0\r\n\r\n")

    async with peer(tmp_path, script) as pool:
        connection = await pool.open("GET", "/x")
        assert await connection.head(1) == 200
        await asyncio.sleep(0.2)
        assert num_written * 0x10000 < 3 * http.MAX_BUFFERED_BYTES
        assert len(await body_of(connection)) == 200 * 0x10000
        pool.release(connection)


async def test_no_peer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError) as caught:
        await exchange(Pool(Address(path=str(tmp_path / "absent")), QUICK))
    assert not caught.value.answered
