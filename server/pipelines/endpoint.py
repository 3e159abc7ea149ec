"""An address, key and model of an OpenAI-compatible server, and requests to it, tried again where they should be."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from typing_extensions import override

from server.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

MAX_TRIES = 6
MAX_WAIT_S = 60.0
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, with which key, for which model."""

    base_url: str
    key: str
    model: str

    @override
    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, <redacted>, {self.model!r})"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `error` is empty where the status is 200, else a code or the name of a transport error."""

    status: int
    body: Any
    headers: Mapping[str, str]
    error: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name an endpoint."""
    parser.add_argument(
        "--env", type=Path, metavar="FILE", help="a client.env as the server writes it (default: the environment)"
    )
    parser.add_argument("--base-url", help="address, with /v1 (default: OPENAI_BASE_URL)")
    parser.add_argument("--model", help="the model's id (default: MODEL)")


def from_args(args: argparse.Namespace) -> Endpoint:
    """Return the endpoint of `--env`, `--base-url` and `--model`; the key comes from the environment or the file only.

    Raises:
        ConfigError: Something is missing.
    """
    env = dict(os.environ) if args.env is None else read_env(args.env)
    base_url = args.base_url or env.get("OPENAI_BASE_URL", "")
    model = args.model or env.get("MODEL", "")
    return parse(
        {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": env.get("OPENAI_API_KEY", ""), "MODEL": model}, "this command"
    )


def read_env(path: Path) -> dict[str, str]:
    """Return the variables of an env file.

    Raises:
        ConfigError: It can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"The env file {path} can't be read. 'strongroom serve' writes client.env.") from err
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse(env: Mapping[str, str], who: str) -> Endpoint:
    """Return the endpoint that three variables describe.

    Raises:
        ConfigError: One is missing.
    """
    missing = [key for key in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "MODEL") if not env.get(key)]
    if missing:
        raise ConfigError(f"{missing[0]} is not set for {who}. Use a client.env as the server writes it.")
    return Endpoint(env["OPENAI_BASE_URL"].rstrip("/"), env["OPENAI_API_KEY"], env["MODEL"])


class Caller:
    """Sends requests to one endpoint, none while the server asks to wait. Hold it in `async with`.

    Args:
        endpoint: Where to.
        concurrency: How many requests at a time.
        timeout_s: For one try.
        max_tries: For one request.
    """

    def __init__(
        self, endpoint: Endpoint, *, concurrency: int, timeout_s: float = 600.0, max_tries: int = MAX_TRIES
    ) -> None:
        self.endpoint = endpoint
        self._gate = asyncio.Semaphore(concurrency)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._max_tries = max_tries
        self._resume_s = 0.0  # on the loop's clock
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Caller:
        self._session = aiohttp.ClientSession(
            timeout=self._timeout, headers={"Authorization": f"Bearer {self.endpoint.key}"}
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._session.close()

    async def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Return the answer to `POST {base_url}{path}`, tried again where the server or the network asks for it."""
        loop = asyncio.get_running_loop()
        reply = Reply(0, None, {}, "not sent")
        async with self._gate:
            for attempt in range(1, self._max_tries + 1):
                # One refusal holds all requests back: a server that is full gains nothing from the others' tries.
                while (wait_s := self._resume_s - loop.time()) > 0:  # noqa: ASYNC110 - a time, not an event
                    await asyncio.sleep(wait_s)
                reply, retry_s = await self._try(path, body, attempt)
                if retry_s is None or attempt == self._max_tries:
                    break
                self._resume_s = max(self._resume_s, loop.time() + retry_s)
        return reply

    async def _try(self, path: str, body: Mapping[str, Any], attempt: int) -> tuple[Reply, float | None]:
        """Return what one try gave, and after how long to try again, if at all."""
        later_s = min(0.5 * 2**attempt, 30.0)
        try:
            async with self._session.post(f"{self.endpoint.base_url}{path}", json=body) as response:
                data = await response.json(content_type=None)
                if response.status == 200:
                    return Reply(200, data, response.headers, ""), None
                error = data.get("error") if isinstance(data, dict) else None
                code = str((error or {}).get("code") or response.status) if isinstance(error, dict) else "error"
                reply = Reply(response.status, data, response.headers, code)
                return reply, _retry_s(response.headers, later_s) if response.status in _RETRIED else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as err:
            return Reply(0, None, {}, type(err).__name__), later_s


def _retry_s(headers: Mapping[str, str], default_s: float) -> float:
    try:
        asked_s = float(headers.get("retry-after", ""))
    except ValueError:
        return default_s
    return min(max(asked_s, 0.0), MAX_WAIT_S) if asked_s == asked_s else default_s
