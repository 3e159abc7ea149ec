"""Fetches tokens from an identity provider for a person (device flow, RFC 8628) or a robot (client credentials)."""

from __future__ import annotations

import base64
import json
import os
import ssl
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from server.auth.jwks import check_url, fetch_json
from server.errors import ConfigError, PermissionDeniedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.types import Secret

# A token that ends sooner than this is renewed before it is handed out.
MIN_LEFT_S = 60.0
MAX_POLL_S = 900.0


@dataclass(frozen=True, slots=True, repr=False)
class Tokens:
    """What a provider gave; kept in a private file."""

    issuer: str
    client_id: str
    access_token: str
    refresh_token: str | None
    expires_at_s: float


class Login:
    """One client of one provider.

    Args:
        issuer: The provider's address.
        client_id: Who we are to it.
        scope: What to ask for.
        ca: Certificates to check the provider's with, where the system's are not to be used.
        clock: Seconds since the epoch.
        sleep: How to wait between polls.

    Raises:
        ConfigError: The address is not https.
        UnavailableError: The provider does not answer.
    """

    def __init__(
        self,
        issuer: str,
        client_id: str,
        *,
        scope: str,
        ca: Path | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_url(issuer)
        self._issuer = issuer
        self._client_id = client_id
        self._scope = scope
        self._clock = clock
        self._sleep = sleep
        self._context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        self._endpoints = fetch_json(issuer.rstrip("/") + "/.well-known/openid-configuration", self._context)
        if self._endpoints.get("issuer") != issuer:
            raise ConfigError("The identity provider calls itself otherwise; use its issuer address as it spells it.")

    def as_person(self, show: Callable[[str, str], None]) -> Tokens:
        """Have a person approve on another screen; wait until they have.

        Args:
            show: Gets the address to open and the code to enter there.

        Raises:
            PermissionDeniedError: They refused, or did not come.
            UnavailableError: The provider does not answer.
        """
        started = self._post("device_authorization_endpoint", {"scope": self._scope})
        if "device_code" not in started:
            raise PermissionDeniedError(f"The identity provider refused to begin: {_error_of(started)}.")
        show(
            str(started.get("verification_uri_complete") or started["verification_uri"]),
            str(started["user_code"]),
        )
        interval_s = float(started.get("interval", 5))
        ends_at_s = self._clock() + min(float(started.get("expires_in", MAX_POLL_S)), MAX_POLL_S)
        while self._clock() < ends_at_s:
            answer = self._post(
                "token_endpoint",
                {
                    "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
                    "device_code": str(started["device_code"]),
                },
            )
            if "access_token" in answer:
                return self._keep(answer)
            if answer.get("error") == "slow_down":
                interval_s += 5
            elif answer.get("error") != "authorization_pending":
                raise PermissionDeniedError(f"The identity provider gave no token: {_error_of(answer)}.")
            self._sleep(interval_s)
        raise PermissionDeniedError("Nobody approved in time; run the command again.")

    def as_robot(self, secret: Secret) -> Tokens:
        """Prove by a client secret.

        Raises:
            PermissionDeniedError: The provider refused.
            UnavailableError: The provider does not answer.
        """
        answer = self._post("token_endpoint", {"grant_type": "client_credentials", "scope": self._scope}, secret)
        return self._keep(answer)

    def renew(self, refresh_token: str) -> Tokens:
        """Exchange a refresh token.

        Raises:
            PermissionDeniedError: The provider refused; log in again.
            UnavailableError: The provider does not answer.
        """
        answer = self._post("token_endpoint", {"grant_type": "refresh_token", "refresh_token": refresh_token})
        return self._keep({"refresh_token": refresh_token} | answer)

    def _keep(self, answer: dict[str, Any]) -> Tokens:
        token = answer.get("access_token")
        if not isinstance(token, str):
            raise PermissionDeniedError(f"The identity provider gave no token: {_error_of(answer)}.")
        expires_at_s = self._clock() + float(answer.get("expires_in", 300))
        refresh = answer.get("refresh_token")
        return Tokens(self._issuer, self._client_id, token, refresh if isinstance(refresh, str) else None, expires_at_s)

    def _post(self, endpoint: str, form: dict[str, str], secret: Secret | None = None) -> dict[str, Any]:
        url = self._endpoints.get(endpoint)
        if not isinstance(url, str):
            raise UnavailableError(f"The identity provider offers no {endpoint.replace('_', ' ')}.")
        check_url(url)
        headers = {"content-type": "application/x-www-form-urlencoded"}
        if secret is None:
            form = form | {"client_id": self._client_id}
        else:
            pair = f"{quote(self._client_id, safe='')}:{quote(secret.reveal(), safe='')}"
            headers["authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        return fetch_json(url, self._context, form=urlencode(form).encode(), headers=headers, with_refusals=True)


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Write tokens to a file that only its owner reads, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(tokens), file)
    fresh.replace(path)


def load_tokens(path: Path) -> Tokens | None:
    """Return the tokens kept in a file; None where there are none.

    Raises:
        ConfigError: The file is damaged, or can be read by others.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"The token file {path} can be read by others; run: chmod 600 {path}")
        return Tokens(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"The token file {path} is damaged; delete it and log in again.") from error


def _error_of(answer: dict[str, Any]) -> str:
    """Return the provider's error code; its words may quote what was sent."""
    code = str(answer.get("error", "no reason given"))
    return code if code.replace("_", "").isalnum() and len(code) < 64 else "no reason given"
