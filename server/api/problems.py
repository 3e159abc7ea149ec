"""The only map from an exception to an HTTP status and a body, in the dialect of the route."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import orjson

from server.errors import (
    ContentBlockedError,
    EngineError,
    RateLimitedError,
    RequestError,
    StartError,
    StrongroomError,
    UnavailableError,
)

log = logging.getLogger("strongroom.api")

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    502: "server_error",
    503: "server_error",
    500: "server_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    502: "api_error",
    503: "overloaded_error",
    500: "api_error",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What the caller gets: `detail` is safe to show, whatever raised it."""

    status: int
    code: str
    message: str
    param: str | None
    headers: dict[str, str]
    findings: tuple[dict[str, object], ...] = ()

    def openai(self) -> dict[str, Any]:
        """Return the body in OpenAI's form."""
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        if self.findings:
            error["findings"] = list(self.findings)
        return {"error": error}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """Return the body in Anthropic's form."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        error: dict[str, Any] = {"type": kind, "message": self.message, "code": self.code}
        if self.findings:
            error["findings"] = list(self.findings)
        return {"type": "error", "error": error, "request_id": request_id}

    def openai_bytes(self) -> bytes:
        """Return `openai()` encoded."""
        return orjson.dumps(self.openai())


# Claude Code asks ten times more with the same key unless it is told not to.
_UNKNOWN = {"www-authenticate": 'Bearer realm="strongroom"', "x-should-retry": "false"}


def describe(error: BaseException) -> Problem:
    """Return what the caller may know of `error`; anything not in the tree of `errors.py` becomes a plain 500."""
    match error:
        case RateLimitedError():
            headers = {"retry-after": str(error.retry_after_s), **error.headers}
            return Problem(error.status, error.code, str(error), None, headers)
        case ContentBlockedError():
            return Problem(error.status, error.code, str(error), error.param, {}, error.findings)
        case RequestError():
            return Problem(error.status, error.code, str(error), error.param, _UNKNOWN if error.status == 401 else {})
        case UnavailableError():
            return Problem(error.status, error.code, str(error), None, {"retry-after": str(error.retry_after_s)})
        case EngineError():
            return Problem(error.status, error.code, str(error), None, {})
        case StrongroomError() if not isinstance(error, StartError):
            return Problem(error.status, error.code, str(error), None, {})
        case _:
            # The type alone: an exception's text may hold a piece of the request.
            log.error("unexpected error", extra={"error": type(error).__name__}, exc_info=log.isEnabledFor(10))
            return Problem(
                500,
                "internal_error",
                "The server failed on this request. Try again; if it lasts, give your administrator the x-request-id.",
                None,
                {},
            )
