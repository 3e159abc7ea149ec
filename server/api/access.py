"""Authentication and authorisation of the routes that reach no model; what they refuse is on record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from server.errors import AuthenticationError, PermissionDeniedError
from server.types import Chat, ModelRequest, WireFormat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from server.ports import Authenticator
    from server.types import Client, Credentials, Decision, Obligations, Principal


class DecidesAll(Protocol):
    """A policy that also decides what is asked of the service and not of a model."""

    def decide(self, principal: Principal, action: str, request: ModelRequest | None, client: Client) -> Decision:
        """Return the decision with its reason."""
        ...


class Access:
    """Who may do what, outside the pipeline.

    Args:
        auth: Proves who the caller is.
        policy: Decides.
        record: Appends an act to the audit log, durable on return.
    """

    def __init__(self, auth: Authenticator, policy: DecidesAll, record: Callable[..., Awaitable[Any]]) -> None:
        self._auth = auth
        self._policy = policy
        self._record = record

    async def identify(self, credentials: Credentials, client: Client, route: str) -> Principal:
        """Return who the caller is; a refusal is on record first.

        Raises:
            AuthenticationError: No valid credential.
            RateLimitedError: Too many failures from this address.
        """
        try:
            return await self._auth.authenticate(credentials, client)
        except AuthenticationError as err:
            await self._record(
                "gateway:credential:refused",
                route=route,
                address=client.address,
                reason=err.reason,
                key_id=err.key_id or "",
            )
            raise

    async def admit(self, credentials: Credentials, client: Client, route: str, action: str) -> Principal:
        """Return who the caller is, if policy permits `action`; a refusal is on record first.

        Raises:
            AuthenticationError: No valid credential.
            PermissionDeniedError: No policy permits it.
        """
        principal = await self.identify(credentials, client, route)
        await self.permit(principal, action, None, client, route)
        return principal

    async def permit(
        self, principal: Principal, action: str, request: ModelRequest | None, client: Client, route: str
    ) -> Decision:
        """Return the decision, if it permits; a refusal is on record first.

        Raises:
            PermissionDeniedError: No policy permits it.
        """
        decision = self._policy.decide(principal, action, request, client)
        if not decision.allowed:
            await self._record(
                "admin:request:refused",
                route=route,
                address=client.address,
                action=action,
                subject=principal.subject,
                tenant=principal.tenant,
                reason=decision.reason,
            )
            raise PermissionDeniedError(decision.reason)
        return decision

    def obligations(self, principal: Principal, action: str, request: ModelRequest, client: Client) -> Obligations:
        """Return what policy would demand of `action`; nothing where it would not permit it."""
        return self._policy.decide(principal, action, request, client).obligations

    async def act(self, event: str, principal: Principal, **what: Any) -> None:
        """Put an act on record; it must be durable before it takes effect.

        Raises:
            AuditUnavailableError: The log cannot be written; don't act.
        """
        await self._record(event, subject=principal.subject, tenant=principal.tenant, **what)

    def may_list(self, principal: Principal, model_id: str, client: Client) -> bool:
        """Whether the caller may see this model in the list."""
        glance = ModelRequest(WireFormat.CHAT, model_id, Chat(()), {})
        return self._policy.decide(principal, "model:model:list", glance, client).allowed
