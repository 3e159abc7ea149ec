"""The public keys of an identity provider: fetched in a thread, kept when the provider is down."""

from __future__ import annotations

import ipaddress
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jwt
from typing_extensions import override

from server.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_DOCUMENT_BYTES = 1 << 20
FETCH_TIMEOUT_S = 5.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    @override
    def redirect_request(self, *_arguments: object, **_named: object) -> None:
        """Follow nothing: an issuer's documents are where the issuer says, or nowhere."""


class ProviderKeys:
    """The signing keys of one issuer.

    Keys are fetched again every `refresh_s`. A key id that is not known is looked for at once, but at most once in
    `cooldown_s`: tokens with invented ids don't hammer the provider. When the provider does not answer, the keys that
    were fetched last go on.

    Args:
        issuer: The issuer's address, as it stands in tokens.
        ca: Certificates that the provider's own is checked against, where the system's are not to be used.
        refresh_s: Seconds between fetches.
        cooldown_s: Seconds between fetches for unknown ids, and after a failure.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        issuer: str,
        *,
        ca: Path | None = None,
        refresh_s: float = 300.0,
        cooldown_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_url(issuer)
        self.issuer = issuer
        self._refresh_s = refresh_s
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        self._keys: dict[str, jwt.PyJWK] = {}
        self._jwks_url: str | None = None
        self._tried_at_s = -cooldown_s
        self._fetched_at_s: float | None = None
        self._lock = threading.Lock()

    def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key of this id if it is known now; never waits."""
        return self._keys.get(key_id)

    @property
    def has_keys(self) -> bool:
        """Whether keys were ever fetched."""
        return self._fetched_at_s is not None

    def is_stale(self) -> bool:
        """Whether it is time to fetch again, and allowed."""
        now_s = self._clock()
        due = self._fetched_at_s is None or now_s - self._fetched_at_s >= self._refresh_s
        return due and now_s - self._tried_at_s >= self._cooldown_s

    def may_look(self) -> bool:
        """Whether an unknown id may be looked for now."""
        return self._clock() - self._tried_at_s >= self._cooldown_s

    def fetch(self) -> None:
        """Fetch the keys; blocking, so call it in a thread. Of several calls at once only one asks the provider.

        Raises:
            UnavailableError: The provider does not answer, or not as it should; the old keys stay.
        """
        with self._lock:
            if self._clock() - self._tried_at_s < self._cooldown_s:
                return  # another caller has just asked
            self._tried_at_s = self._clock()
            if self._jwks_url is None:
                self._jwks_url = self._discover()
            document = fetch_json(self._jwks_url, self._context)
            keys: dict[str, jwt.PyJWK] = {}
            for entry in document.get("keys", ()):
                try:
                    key = jwt.PyJWK.from_dict(entry)
                except (jwt.PyJWKError, jwt.InvalidKeyError, KeyError, TypeError, ValueError, AttributeError):
                    continue  # a key of a kind that we don't know signs no token that we accept
                if key.key_id and key.key_type != "oct" and key.public_key_use in (None, "sig"):
                    keys[key.key_id] = key
            if not keys:
                raise UnavailableError("The identity provider publishes no key that could sign a token.")
            self._keys = keys
            self._fetched_at_s = self._clock()

    def _discover(self) -> str:
        document = fetch_json(self.issuer.rstrip("/") + "/.well-known/openid-configuration", self._context)
        if document.get("issuer") != self.issuer:
            raise UnavailableError("The identity provider calls itself otherwise than the configured issuer.")
        url = document.get("jwks_uri")
        if not isinstance(url, str):
            raise UnavailableError("The identity provider does not say where its keys are.")
        try:
            check_url(url)
        except ConfigError as error:
            raise UnavailableError("The identity provider's keys are not served over TLS.") from error
        return url


def check_url(url: str) -> None:
    """Refuse an address that is neither https nor this machine's own.

    Raises:
        ConfigError: It is.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname:
        try:
            if ipaddress.ip_address(parts.hostname).is_loopback:
                return
        except ValueError:
            pass  # a name, and names are not this machine's own for sure
    raise ConfigError("The identity provider's address must begin with https:// (http only for 127.0.0.1).")


def fetch_json(
    url: str,
    context: ssl.SSLContext,
    *,
    form: bytes | None = None,
    headers: dict[str, str] | None = None,
    with_refusals: bool = False,
) -> dict[str, Any]:
    """Return the JSON object at an address that `check_url` accepted.

    Args:
        url: The address.
        context: How TLS is checked.
        form: What to post; None to get.
        headers: Further headers.
        with_refusals: Return the object of a 400 or 401 too; OAuth says there what it wants.

    Raises:
        UnavailableError: No answer in time, another status, too long, or no JSON object.
    """
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({}), _NoRedirect
    )
    # The scheme was checked by check_url: file: and others don't get here.
    request = urllib.request.Request(url, data=form, headers={"accept": "application/json", **(headers or {})})  # noqa: S310
    try:
        try:
            response = opener.open(request, timeout=FETCH_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if not with_refusals or error.code not in (400, 401):
                raise
            response = error
        with response:
            content = response.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise UnavailableError("The identity provider's answer is too long.")
        document = json.loads(content)
    except urllib.error.HTTPError as error:
        with error:
            raise UnavailableError(f"The identity provider answers with status {error.code}.") from error
    except (OSError, ValueError) as error:
        raise UnavailableError(f"The identity provider does not answer ({type(error).__name__}).") from error
    if not isinstance(document, dict):
        raise UnavailableError("The identity provider's answer is no JSON object.")
    return document
