"""A request's body: read under limits of size and time, then parsed as strict JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

from server.errors import PayloadTooLargeError, RequestError, RequestTimeoutError, UnsupportedMediaTypeError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from server.api.protocol import Peer

MAX_DEPTH = 64
"""Deepest nesting accepted; tool schemas of real agents stay below 20."""

MAX_VALUES = 200_000
"""Most values and containers accepted: the text of a prompt is one, and a million empty lists take seconds to parse."""

MAX_DISCARD_BYTES = 1024 * 1024 * 1024
"""How much of an oversized body is read and thrown away, so that the client reads our answer and not a reset."""


class ClientDisconnectedError(Exception):
    """The client closed its socket; there is nobody to answer."""


class Body:
    """The body of one request. Read it once; `discard` what an early answer left unread."""

    def __init__(self, scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float) -> None:
        self._scope = scope
        self._peer: Peer | None = scope.get("peer")  # only our own listeners say it
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self.complete = False

    async def read(self) -> bytes:
        """Return the whole body.

        Raises:
            PayloadTooLargeError: It is larger than the limit, by its own word or by count.
            RequestTimeoutError: It did not arrive in time.
            UnsupportedMediaTypeError: It is encoded or is not JSON by its own word.
            ClientDisconnectedError: The client left.
        """
        self._check_headers()
        # Nearly always; a time-out for what can't wait costs more than reading it.
        if self._peer is not None and self._peer.has_sent_body:
            piece = await self._next()
            self._check_size(len(piece))
            return piece
        pieces = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while not self.complete:
                    piece = await self._next()
                    size += len(piece)
                    self._check_size(size)
                    pieces.append(piece)
        except TimeoutError as err:
            raise RequestTimeoutError(
                f"The request's body did not arrive within {self._timeout_s:g} s; send it again."
            ) from err
        return b"".join(pieces)

    async def discard(self) -> bool:
        """Throw away what is left, within bounds; return whether the body's end was reached."""
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while not self.complete and size < MAX_DISCARD_BYTES:
                    size += len(await self._next())
        except (TimeoutError, ClientDisconnectedError):
            return False
        return self.complete

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        self.complete = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise PayloadTooLargeError(
                f"The request's body is larger than the {self._max_bytes} bytes this server accepts; send less."
            )

    def _check_headers(self) -> None:
        content_type = b""
        for name, value in self._scope["headers"]:
            if name == b"content-type":
                content_type = value.split(b";")[0].strip().lower()
            elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise UnsupportedMediaTypeError(
                    "Send the body without a Content-Encoding; compressed bodies are refused."
                )
            elif name == b"content-length" and value.isdigit() and len(value) < 20:
                self._check_size(int(value))
        if content_type not in (b"application/json", b""):
            raise UnsupportedMediaTypeError("Send the body as JSON, with 'Content-Type: application/json'.")


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate names, finite numbers, whole code points, bounded depth.

    Raises:
        RequestError: It is something else, with what and where.
    """
    if not body.strip():
        raise RequestError("The request has no body; send a JSON object.", code="invalid_json")
    try:
        # UTF-16, a byte order mark and stray bytes all fail here or at the first character below.
        text = body.decode("utf-8")
        _check_num_values(body)
        value = _DECODER.decode(text)
    except UnicodeDecodeError as err:
        raise RequestError(f"The body is not UTF-8 (byte {err.start}).", code="invalid_json") from err
    except json.JSONDecodeError as err:
        raise RequestError(
            f"The body is not valid JSON: {err.msg} at line {err.lineno}, column {err.colno}.", code="invalid_json"
        ) from err
    except RecursionError as err:
        raise _too_deep() from err
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    # Counting brackets is cheap and settles nearly every body; only a suspicious one is walked.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in body and _SURROGATE_ESCAPE.search(text):
        _check_code_points(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise RequestError("A JSON object in the body has the same name twice.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"{name} is not JSON; send a finite number.", code="invalid_json")


def _bounded(digits: str) -> int:
    # Beyond 64 bits neither the engine nor a chat template takes a number, and each fails in a way of its own.
    value = int(digits) if len(digits) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        raise RequestError("A whole number in the body does not fit 64 bits.", code="invalid_json")
    return value


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def _check_num_values(body: bytes) -> None:
    def count(text: bytes) -> int:
        return text.count(b",") + text.count(b"[") + text.count(b"{")

    # Signs inside strings count only where there are suspiciously many: code is full of them. More strings than names
    # and values may have are too many, whatever else there is: looking for them ends there.
    if count(body) <= MAX_VALUES:
        return
    rest, num_strings = _STRING.subn(b"", body, 2 * MAX_VALUES)
    if num_strings == 2 * MAX_VALUES or count(rest) > MAX_VALUES:
        raise RequestError(f"The body holds more than {MAX_VALUES} values; send less.", code="invalid_json")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RequestError("A number in the body is too large for a double.", code="invalid_json")
    return value


def _too_deep() -> RequestError:
    return RequestError(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(v for v in item.values() if isinstance(v, (dict, list)))
            else:
                deeper.extend(v for v in item if isinstance(v, (dict, list)))
        if not deeper:
            return
        level = deeper
    raise _too_deep()


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _check_code_points(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as err:
        raise RequestError("A string in the body holds half a surrogate pair.", code="invalid_json") from err


# Made once: `json.loads` would build a decoder for each body, which costs as much as reading a small one.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded
)
