"""Credentials to a principal: the one place that decides who a caller is, whatever header or method was used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from server.auth.api_key import MAX_CREDENTIAL_CHARS, KeyRing, parse_key_id
from server.errors import AuthenticationError, ThrottledError, UnavailableError
from server.store.incidents import Quarantine, Quarantined

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.auth.throttle import FailureThrottle
    from server.types import Client, Credentials, Principal


class TokenVerifier(Protocol):
    """Access tokens of an identity provider."""

    def remembered(self, token: str) -> Principal | None:
        """Return the principal of a token that was verified before and still holds, or None."""
        ...

    async def authenticate(self, token: str) -> Principal:
        """Verify a token.

        Raises:
            AuthenticationError: It is not valid.
            UnavailableError: The provider's keys were never fetched and can't be now.
        """
        ...


class CertificateVerifier(Protocol):
    """Client certificates."""

    def authenticate(self, certificate: bytes) -> Principal:
        """Map a certificate that TLS has verified to a principal.

        Raises:
            AuthenticationError: It maps to nobody, or was revoked.
        """
        ...

    def is_revoked(self, credential_id: str) -> bool:
        """Whether the certificate was revoked since."""
        ...


class Authenticator:
    """Implements `ports.Authenticator` over API keys, tokens and certificates.

    A caller whose address has failed too often is told to wait, with two exceptions that let the others behind the
    same address work on: a key of our own form (256 random bits: no number of guesses finds one), and a token that was
    verified before. Anything else is refused unseen, so a flood buys no signature checks. Callers without a credential
    guess nothing and hinder nobody; they are counted apart, so that they can't fill the audit log.

    Args:
        ring: The API keys.
        throttle: Failures by address.
        keyless: Callers without a credential, or with a malformed one, by address.
        quarantine: What the incident switch took out of service.
        store_age_s: How old keys and quarantine in memory may be, in seconds; see `max_age_s`.
        max_age_s: Beyond this age nobody is served any more: a revocation may have been missed.
        tokens: Access tokens, where an identity provider is configured.
        certificates: Client certificates, where mutual TLS is configured.
    """

    def __init__(
        self,
        ring: KeyRing,
        *,
        throttle: FailureThrottle,
        keyless: FailureThrottle,
        quarantine: Quarantine,
        store_age_s: Callable[[], float] = lambda: 0.0,
        max_age_s: float = 5.0,
        tokens: TokenVerifier | None = None,
        certificates: CertificateVerifier | None = None,
    ) -> None:
        self._ring = ring
        self._throttle = throttle
        self._keyless = keyless
        self._quarantine = quarantine
        self._store_age_s = store_age_s
        self._max_age_s = max_age_s
        self._tokens = tokens
        self._certificates = certificates

    async def authenticate(self, credentials: Credentials, client: Client) -> Principal:
        """Return who the caller is.

        Raises:
            AuthenticationError: No credential, more than one, or one that is not valid.
            ThrottledError: Too many failures from this address.
            UnavailableError: Keys in memory are too old to be relied on.
        """
        self._check_age()
        try:
            principal = await self._identify(credentials, client)
            if self._is_quarantined(principal):
                raise AuthenticationError("quarantined", key_id=principal.credential_id)
        except AuthenticationError:
            is_guess = credentials.malformed is None and credentials.values
            throttle = self._throttle if is_guess else self._keyless
            wait_s = throttle.wait_s(client.address)
            throttle.fail(client.address)
            if wait_s > 0:
                raise _too_many(wait_s) from None
            raise
        return principal

    def is_revoked(self, principal: Principal) -> bool:
        """Whether the credential behind `principal` was revoked, quarantined or ran out since.

        Raises:
            UnavailableError: Keys in memory are too old to tell.
        """
        self._check_age()
        if self._is_quarantined(principal):
            return True
        if principal.method == "api_key":
            return self._ring.is_revoked(principal.credential_id)
        certificates = self._certificates if principal.method == "mtls" else None
        if certificates is not None and certificates.is_revoked(principal.credential_id):
            return True
        # A token can't be revoked at its provider in a way that we hear of; it ends with its own expiry.
        return principal.expires_at_s is not None and self._ring.now_s() >= principal.expires_at_s

    def _check_age(self) -> None:
        if self._store_age_s() > self._max_age_s:
            raise UnavailableError("Revocations can't be read from the store; nobody is served until they can.")

    async def _identify(self, credentials: Credentials, client: Client) -> Principal:
        if credentials.malformed is not None:
            raise AuthenticationError(credentials.malformed)
        if len(credentials.values) > 1:
            raise AuthenticationError("more than one credential")
        if not credentials.values:
            return self._from_certificate(credentials.certificate)
        principal = await self._from_text(credentials.values[0].reveal(), client)
        # A certificate beside a key must be of the same tenant: a stolen key is of no use on another's machine.
        if (
            credentials.certificate is not None
            and self._certificates is not None
            and self._certificates.authenticate(credentials.certificate).tenant != principal.tenant
        ):
            raise AuthenticationError("certificate of another tenant", key_id=principal.credential_id)
        return principal

    async def _from_text(self, text: str, client: Client) -> Principal:
        if len(text) > MAX_CREDENTIAL_CHARS:
            raise AuthenticationError("credential too long")
        if not text.isascii() or not text.isprintable():
            raise AuthenticationError("credential not printable ASCII")
        if parse_key_id(text) is not None:
            return self._ring.authenticate(text)
        is_token = self._tokens is not None and text.count(".") == 2
        if is_token and self._tokens is not None:
            known = self._tokens.remembered(text)
            if known is not None:
                return known
        wait_s = self._throttle.wait_s(client.address)
        if wait_s > 0:
            self._throttle.fail(client.address)
            raise _too_many(wait_s)
        if is_token and self._tokens is not None:
            return await self._tokens.authenticate(text)
        return self._ring.authenticate(text)

    def _from_certificate(self, certificate: bytes | None) -> Principal:
        if certificate is None or self._certificates is None:
            raise AuthenticationError("no credential")
        return self._certificates.authenticate(certificate)

    def _is_quarantined(self, principal: Principal) -> bool:
        quarantine = self._quarantine
        if quarantine.is_empty:
            return False
        return (
            quarantine.has(Quarantined.KEY, principal.credential_id)
            or quarantine.has(Quarantined.SUBJECT, f"{principal.tenant}/{principal.subject}")
            or quarantine.has(Quarantined.TENANT, principal.tenant)
        )


def _too_many(wait_s: float) -> ThrottledError:
    seconds = math.ceil(wait_s)
    return ThrottledError(
        f"Too many failed authentications from this address; try again in {seconds} s with a valid key.",
        retry_after_s=seconds,
    )
