"""One request to an OpenAI-compatible server, and when each event of its answer came.

Events are stamped when their bytes arrive and read when the answer is whole, so that reading one answer does not delay
the stamps of another. Connections are kept, as every client of such a server does.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import httptools
import orjson
from typing_extensions import override

MAX_ANSWER_BYTES = 32 * 1024 * 1024


class AnswerError(Exception):
    """An answer that does not count; the message is its kind, short enough to be counted by."""


@dataclass(frozen=True)
class Target:
    """A server: where it listens, under which path, and the key it wants."""

    host: str
    port: int
    path: str
    uds: str | None = None
    tls: ssl.SSLContext | None = None
    key: str = ""

    @override
    def __repr__(self) -> str:
        """Without the key."""
        return f"Target({self.label})"

    @property
    def label(self) -> str:
        """The address as it may be published: no key."""
        if self.uds is not None:
            return f"unix socket, {self.path}"
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.path}"

    @classmethod
    def parse(cls, url: str, *, key: str = "", ca: str | None = None) -> Target:
        """Read `http(s)://HOST:PORT/v1` or `unix:///PATH.sock` (whose path is then /v1).

        Raises:
            ValueError: Another form.
        """
        parts = urlsplit(url)
        if parts.scheme == "unix" and parts.path and not parts.netloc:
            return cls("localhost", 0, "/v1", uds=unquote(parts.path), key=key)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError("the URL must look like http://HOST:PORT/v1, https://HOST/v1 or unix:///PATH.sock")
        tls = ssl.create_default_context(cafile=ca) if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, parts.path.rstrip("/") or "/v1", tls=tls, key=key)

    def encode(self, route: str, body: bytes) -> bytes:
        """The whole request."""
        host = self.host if self.uds is not None else f"{self.host}:{self.port}"
        auth = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        head = f"POST {self.path}/{route} HTTP/1.1\r\nhost: {host}\r\n{auth}content-type: application/json\r\n"
        return (
            f"{head}accept: text/event-stream, application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )


@dataclass
class Answer:
    """What came back. Times are of `time.perf_counter`; `texts_s` has one for each event that brought text."""

    sent_s: float
    end_s: float
    texts_s: list[float]
    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    output_tokens: int
    cached_tokens: int | None
    tokens_from_usage: bool


class _Connection(asyncio.Protocol):
    """One kept connection; one answer at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.answered: asyncio.Future[None] | None = None
        self.lost = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, request: bytes) -> asyncio.Future[None]:
        self.pieces: list[tuple[float, bytes]] = []
        self.num_bytes = 0
        self.status = 0
        self.keep = True
        self._parser = httptools.HttpResponseParser(self)
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answered

    @override
    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError):
            self._fail("not HTTP")

    def on_body(self, body: bytes) -> None:
        self.num_bytes += len(body)
        if self.num_bytes > MAX_ANSWER_BYTES:
            self._fail("answer too long")
            return
        self.pieces.append((self._now_s, body))

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.keep = self._parser.should_keep_alive()
        if self.answered is not None and not self.answered.done():
            self.answered.set_result(None)

    def _fail(self, kind: str) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(AnswerError(kind))
        self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost = True
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(AnswerError("connection lost"))


class Client:
    """Sends requests to one target, over as many connections as are in use at once."""

    def __init__(self, target: Target, *, timeout_s: float = 600.0) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._idle: deque[_Connection] = deque()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost:
                return connection
        loop = asyncio.get_running_loop()
        target = self._target
        try:
            if target.uds is not None:
                return (await loop.create_unix_connection(_Connection, target.uds))[1]
            return (await loop.create_connection(_Connection, target.host, target.port, ssl=target.tls))[1]
        except (OSError, ssl.SSLError) as err:
            raise AnswerError("no connection") from err

    async def ask(self, route: str, body: bytes, *, stream: bool) -> Answer:
        """Send a request and wait for its whole answer.

        Raises:
            AnswerError: It did not come, or is not whole, or is an error.
        """
        sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                try:
                    await connection.send(self._target.encode(route, body))
                except BaseException:
                    connection.transport.abort()
                    raise
        except TimeoutError:
            raise AnswerError("timeout") from None
        if connection.keep and not connection.lost:
            self._idle.append(connection)
        else:
            connection.transport.close()
        end_s = connection.pieces[-1][0] if connection.pieces else time.perf_counter()
        if connection.status != 200:
            raise AnswerError(f"status {connection.status}")
        if stream:
            return read_stream(connection.pieces, sent_s)
        return _read_plain(b"".join(piece for _, piece in connection.pieces), sent_s, end_s)

    def close(self) -> None:
        """Close the kept connections."""
        while self._idle:
            self._idle.pop().transport.close()


def _text_of(choice: Any) -> tuple[str, bool]:
    """The text of an event's choice, and whether it brought anything a model made."""
    if not isinstance(choice, dict):
        raise AnswerError("not an event")
    made = choice.get("delta") or choice.get("message")
    if not isinstance(made, dict):
        text = choice.get("text") or ""
        return str(text), bool(text)
    text = "".join(str(made[name]) for name in ("reasoning_content", "reasoning", "content") if made.get(name))
    return text, bool(text or made.get("tool_calls"))


def _counts(usage: Any) -> tuple[int | None, int | None, int | None]:
    if not isinstance(usage, dict):
        return None, None, None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return usage.get("prompt_tokens"), usage.get("completion_tokens"), cached


def read_stream(pieces: list[tuple[float, bytes]], sent_s: float) -> Answer:
    """Read stamped pieces of a body as server-sent events.

    Raises:
        AnswerError: An error event, no end, or something that is no event.
    """
    texts_s: list[float] = []
    texts: list[str] = []
    finish: str | None = None
    usage: Any = None
    done = False
    rest = b""
    end_s = sent_s
    for now_s, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # the names of events, comments and blank lines between events
            end_s = now_s
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            try:
                event = orjson.loads(data)
            except orjson.JSONDecodeError:
                raise AnswerError("not an event") from None
            if not isinstance(event, dict) or event.get("error"):
                raise AnswerError("error event" if isinstance(event, dict) else "not an event")
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                text, brought = _text_of(choice)
                finish = choice.get("finish_reason") or finish
                if brought:
                    texts.append(text)
                    texts_s.append(now_s)
    if not done and finish is None:
        raise AnswerError("stream cut")
    prompt_tokens, output_tokens, cached = _counts(usage)
    counted = output_tokens if output_tokens is not None else len(texts_s)
    return Answer(
        sent_s, end_s, texts_s, "".join(texts), finish, prompt_tokens, counted, cached, output_tokens is not None
    )


def _read_plain(body: bytes, sent_s: float, end_s: float) -> Answer:
    try:
        answer = orjson.loads(body)
        choice = answer["choices"][0]
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
        raise AnswerError("not an answer") from None
    prompt_tokens, output_tokens, cached = _counts(answer.get("usage"))
    text, _ = _text_of(choice)
    finish = choice.get("finish_reason")
    return Answer(sent_s, end_s, [], text, finish, prompt_tokens, output_tokens or 0, cached, output_tokens is not None)
