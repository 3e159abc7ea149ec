"""What every request meets before its route: request id, security headers, CORS, a last-resort error handler."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from server.api.problems import describe
from server.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("strongroom.api")

_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]
_EXPOSED = b"x-request-id, x-strongroom-template, x-strongroom-audit-index, retry-after"


class Edge:
    """ASGI middleware of both listeners.

    The request id is ours: a caller's own `x-request-id` is ignored, for it would name records.

    Args:
        app: The application behind.
        cors_origins: Origins whose browsers may call; exact strings.
        direct: Applications by path whose POST requests skip the framework's router and middleware, which cost as much
            as the whole policy decision. The framework knows the same routes for every other method.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        cors_origins: tuple[str, ...] = (),
        direct: Mapping[str, Callable[[], ASGIApp]] | None = None,
    ) -> None:
        self._app = app
        self._direct = dict(direct or {})
        self._origins = frozenset(origin.encode() for origin in cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = "req_" + secrets.token_hex(12)
        origin = b""
        for name, value in scope["headers"]:
            if name == b"origin":
                origin = value
        scope["request_id"] = request_id
        extra = [(b"x-request-id", request_id.encode()), *_SECURITY_HEADERS]
        if self._origins and origin in self._origins:
            extra += [
                (b"access-control-allow-origin", origin),
                (b"vary", b"Origin"),
                (b"access-control-expose-headers", _EXPOSED),
            ]
            if scope["method"] == "OPTIONS":
                await self._preflight(send, extra)
                return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            new = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
            await (self._app if new is None else new())(scope, receive, send_with_headers)
        # The request boundary: no traceback reaches a client, no text of a request the log.
        except Exception as err:  # noqa: BLE001
            if started:
                log.error("a request broke after its answer had begun", extra={"error": type(err).__name__})  # noqa: TRY400
                return
            await send_problem(err, send_with_headers)

    @staticmethod
    async def _preflight(send: Send, extra: list[tuple[bytes, bytes]]) -> None:
        headers = [
            *extra,
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (
                b"access-control-allow-headers",
                b"authorization, x-api-key, api-key, content-type, anthropic-version, "
                b"anthropic-beta, x-stainless-arch, x-stainless-lang, x-stainless-os, x-stainless-package-version, "
                b"x-stainless-runtime, x-stainless-runtime-version, x-stainless-retry-count, x-stainless-timeout, "
                b"x-stainless-helper-method, x-request-id",
            ),
            (b"access-control-max-age", b"600"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def send_problem(error: BaseException, send: Send) -> None:
    """Answer with `error` in OpenAI's form; for what no wire format has claimed."""
    problem = describe(error)
    body = problem.openai_bytes()
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def not_found(path: str) -> NotFoundError:
    """Return the 404 of an unknown path; the path is shortened, for it is the caller's."""
    return NotFoundError(f"There is no route {path[:80]!r}; see /v1/models and docs/clients.md for what there is.")
