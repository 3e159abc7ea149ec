"""OIDC access tokens to a principal: issuer, audience, algorithm, expiry, then claims by configuration."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jwt

from server.auth.names import parse_name
from server.errors import AuthenticationError, ConfigError, UnavailableError
from server.types import Principal, SubjectId, TenantId

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from server.auth.jwks import ProviderKeys

# Signatures by a key that only the provider holds. HMAC is not among them: with it whoever can verify can sign.
KNOWN_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
MAX_REMEMBERED = 16384
# A remembered token is not verified again for this long, so a key withdrawn by the provider ends within it.
REMEMBER_S = 300.0


@dataclass(frozen=True, slots=True)
class ClaimRules:
    """How claims become a principal.

    Attributes:
        audience: What `aud` must hold.
        algorithms: Signature algorithms that are accepted.
        token_types: What `typ` in the header may be, in lower case; RFC 9068 says `at+jwt`. ID tokens are no access
            tokens, so don't add `jwt` for a provider that can do better.
        subject_claim: Who it is.
        tenant_claim: The tenant; where the claim is absent, `default_tenant` or nobody.
        default_tenant: For providers of one tenant.
        groups_claim: A list of group names.
        group_map: Names of the provider to names in policies; others stay as they are, if they can be names.
        scope_claim: A text of names with blanks between them, or a list.
        scope_map: Each of the provider's scopes to permissions or prefixes. A scope that is not in it gives nothing.
        leeway_s: How far clocks may be apart.
    """

    audience: str
    algorithms: frozenset[str] = frozenset({"ES256", "RS256", "EdDSA"})
    token_types: frozenset[str] = frozenset({"at+jwt", "application/at+jwt"})
    subject_claim: str = "sub"
    tenant_claim: str = "tenant"
    default_tenant: str | None = None
    groups_claim: str = "groups"
    group_map: Mapping[str, str] = field(default_factory=dict)
    scope_claim: str = "scope"
    scope_map: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leeway_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse rules that would let anybody in.

        Raises:
            ConfigError: The audience is empty, or an algorithm is none that only the provider can sign with.
        """
        if not self.audience:
            raise ConfigError("The tokens' audience is not set; without it another service's tokens would do.")
        if not self.algorithms or self.algorithms - KNOWN_ALGORITHMS:
            raise ConfigError(f"Token algorithms must be among {', '.join(sorted(KNOWN_ALGORITHMS))}.")
        if not 0 <= self.leeway_s <= 300:
            raise ConfigError("The leeway for token times must be between 0 and 300 s.")


class OIDCVerifier:
    """Implements `authenticator.TokenVerifier` for one issuer.

    Args:
        keys: The issuer's keys.
        rules: How claims become a principal.
        clock: Seconds since the epoch.
    """

    def __init__(self, keys: ProviderKeys, rules: ClaimRules, *, clock: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._rules = rules
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._refresh: asyncio.Task[None] | None = None

    def remembered(self, token: str) -> Principal | None:
        """Return the principal of a token that was verified before and still holds, or None."""
        # The whole digest is the key: two tokens that begin alike are two tokens.
        found = self._known.get(hashlib.sha256(token.encode()).digest())
        return found[1] if found is not None and self._clock() < found[0] else None

    async def authenticate(self, token: str) -> Principal:
        """Verify a token.

        Raises:
            AuthenticationError: It is not valid; `reason` says why.
            UnavailableError: The provider's keys were never fetched and can't be now.
        """
        known = self.remembered(token)
        if known is not None:
            return known
        key_id, algorithm = self._read_header(token)
        key = self._keys.find(key_id)
        if key is None and (self._is_refreshing or self._keys.may_look()):
            # One thread for all who wait: a crowd with invented ids must not take those that others' requests need.
            await asyncio.shield(self._refresh_behind())
            key = self._keys.find(key_id)
        elif self._keys.is_stale():
            self._refresh_behind()
        if key is None:
            if not self._keys.has_keys:
                raise UnavailableError("The identity provider's keys could not be fetched yet.")
            raise AuthenticationError("token signed with an unknown key")
        principal, expires_at_s = self._verify(token, key, algorithm)
        self._remember(token, principal, min(expires_at_s, self._clock() + REMEMBER_S))
        return principal

    def _read_header(self, token: str) -> tuple[str, str]:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise AuthenticationError("not a token") from error
        algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ")
        if algorithm not in self._rules.algorithms:
            raise AuthenticationError("token algorithm not accepted")
        if not isinstance(kind, str) or kind.lower() not in self._rules.token_types:
            raise AuthenticationError("not an access token")
        if "crit" in header:
            raise AuthenticationError("token demands an extension")
        if not isinstance(key_id, str):
            raise AuthenticationError("token names no key")
        return key_id, str(algorithm)

    def _verify(self, token: str, key: jwt.PyJWK, algorithm: str) -> tuple[Principal, float]:
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self._rules.audience,
                issuer=self._keys.issuer,
                options={
                    "require": ["exp", "iat", "iss", "aud", self._rules.subject_claim],
                    # Times are checked below, by the clock that was passed in.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, TypeError, ValueError) as error:
            raise AuthenticationError(f"token refused: {type(error).__name__}") from error
        expires_at_s = self._check_times(claims)
        return self._map(claims, expires_at_s), expires_at_s

    def _check_times(self, claims: dict[str, Any]) -> float:
        now_s, leeway_s = self._clock(), self._rules.leeway_s
        times = {name: claims[name] for name in ("exp", "iat", "nbf") if name in claims}
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in times.values()):
            raise AuthenticationError("token times are no numbers")
        if now_s >= times["exp"] + leeway_s:
            raise AuthenticationError("token expired")
        if times["iat"] > now_s + leeway_s or times.get("nbf", 0) > now_s + leeway_s:
            raise AuthenticationError("token not valid yet")
        return float(times["exp"]) + leeway_s

    def _map(self, claims: dict[str, Any], expires_at_s: float) -> Principal:
        rules = self._rules
        tenant = claims.get(rules.tenant_claim, rules.default_tenant)
        try:
            subject = parse_name(str(claims[rules.subject_claim]), "subject")
            tenant = parse_name(tenant if isinstance(tenant, str) else "", "tenant")
        except ValueError as error:
            raise AuthenticationError("token names no subject or tenant that can be used") from error
        offered = claims.get(rules.groups_claim)
        groups = set()
        for name in offered if isinstance(offered, list) else ():
            try:
                groups.add(parse_name(rules.group_map.get(str(name), str(name)), "group"))
            except ValueError:
                continue  # a name that no policy can mean
        granted = claims.get(rules.scope_claim)
        names = granted.split() if isinstance(granted, str) else granted if isinstance(granted, list) else []
        scopes = frozenset(scope for name in names for scope in rules.scope_map.get(str(name), ()))
        client = str(claims.get("client_id") or claims.get("azp") or "")
        # The same for every token of one subject by one client: limits of a key must not begin anew with a new token.
        credential_id = "oidc:" + hashlib.sha256(f"{tenant}/{subject}/{client}".encode()).hexdigest()[:24]
        return Principal(
            SubjectId(subject), TenantId(tenant), frozenset(groups), scopes, "oidc", credential_id, expires_at_s
        )

    def _remember(self, token: str, principal: Principal, until_s: float) -> None:
        self._known[hashlib.sha256(token.encode()).digest()] = (until_s, principal)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    @property
    def _is_refreshing(self) -> bool:
        return self._refresh is not None and not self._refresh.done()

    def _refresh_behind(self) -> asyncio.Task[None]:
        """Fetch the keys again while requests go on under the ones we have; return the task, of which there is one."""

        async def refresh() -> None:
            try:
                await asyncio.to_thread(self._keys.fetch)
            except UnavailableError:
                return  # the keys that we have go on; the next try comes after the cooldown

        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.get_running_loop().create_task(refresh())
        return self._refresh
