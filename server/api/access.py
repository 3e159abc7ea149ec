"""Authentication and authorisation of the routes that reach no model; what they refuse is on record."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from server.errors import AuthenticationError, PermissionDeniedError, RateLimitedError
from server.policy.permissions import Permission
from server.types import Chat, ModelRequest, WireFormat

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from server.ports import Authenticator
    from server.types import Client, Credentials, Decision, Obligations, Principal


class DecidesAll(Protocol):
    """A policy that also decides what is asked of the service and not of a model."""

    def decide(self, principal: Principal, action: str, request: ModelRequest | None, client: Client) -> Decision:
        """Return the decision with its reason."""
        ...


class Counts(Protocol):
    """Limits of requests for which no model computes."""

    def visit(
        self, principal: Principal, model: str = "", num_requests: int = 1
    ) -> AbstractAsyncContextManager[dict[str, str]]:
        """Count one, or a batch as so many, while it runs; yield the headers of its limits.

        Raises:
            RateLimitedError: On entering: a limit is spent.
        """
        ...


class Access:
    """Who may do what, outside the pipeline.

    Args:
        auth: Proves who the caller is.
        policy: Decides.
        record: Appends an act to the audit log, durable on return.
        limits: Counts requests.
    """

    def __init__(
        self, auth: Authenticator, policy: DecidesAll, record: Callable[..., Awaitable[Any]], limits: Counts
    ) -> None:
        self._auth = auth
        self._policy = policy
        self._record = record
        self._limits = limits

    async def identify(self, credentials: Credentials, client: Client, route: str) -> Principal:
        """Return who the caller is; a refusal is on record first.

        Raises:
            AuthenticationError: No valid credential.
            RateLimitedError: Too many failures from this address.
        """
        try:
            return await self._auth.authenticate(credentials, client)
        except AuthenticationError as err:
            await self._note_refused(err, client, route)
            raise

    async def check_revoked(self, principal: Principal, client: Client, route: str) -> None:
        """Check that the credential still holds, in the middle of long work; a refusal is on record first.

        Raises:
            AuthenticationError: It was revoked or ran out.
            UnavailableError: It can't be told.
        """
        if self._auth.is_revoked(principal):
            err = AuthenticationError("revoked while the request was running", key_id=principal.credential_id)
            await self._note_refused(err, client, route)
            raise err

    async def _note_refused(self, err: AuthenticationError, client: Client, route: str) -> None:
        await self._record(
            "gateway:credential:refused",
            route=route,
            address=client.address,
            reason=err.reason,
            key_id=err.key_id or "",
        )

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
            await self.refuse(principal, action, client, route, decision.reason)
        return decision

    async def refuse(self, principal: Principal, action: str, client: Client, route: str, reason: str) -> NoReturn:
        """Refuse, on record first.

        Raises:
            PermissionDeniedError: Always.
        """
        await self._record(
            "admin:request:refused",
            route=route,
            address=client.address,
            action=action,
            subject=principal.subject,
            tenant=principal.tenant,
            reason=reason,
        )
        raise PermissionDeniedError(reason)

    @asynccontextmanager
    async def counted(
        self, principal: Principal, client: Client, route: str, model: str = "", num_requests: int = 1
    ) -> AsyncGenerator[dict[str, str], None]:
        """Count a request for which no model computes, while it runs; yield the headers that tell of the limits.

        Raises:
            RateLimitedError: On entering: a limit is spent; it is on record first.
        """
        async with AsyncExitStack() as stack:
            try:
                headers = await stack.enter_async_context(self._limits.visit(principal, model, num_requests))
            except RateLimitedError as err:
                await self._record(
                    "gateway:request:refused",
                    route=route,
                    address=client.address,
                    subject=principal.subject,
                    tenant=principal.tenant,
                    outcome="denied",
                    code=err.code,
                    reason=str(err),
                )
                raise
            yield headers

    def obligations(self, principal: Principal, action: str, request: ModelRequest, client: Client) -> Obligations:
        """Return what policy would demand of `action`; nothing where it would not permit it."""
        return self._policy.decide(principal, action, request, client).obligations

    def check(self, principal: Principal, action: str, client: Client) -> None:
        """Check that policy permits `action` of the service; for callers whose own record notes a refusal.

        Raises:
            PermissionDeniedError: No policy permits it.
        """
        decision = self._policy.decide(principal, action, None, client)
        if not decision.allowed:
            raise PermissionDeniedError(decision.reason)

    async def act(self, event: str, principal: Principal, **what: Any) -> None:
        """Put an act on record; it must be durable before it takes effect.

        Raises:
            AuditUnavailableError: The log cannot be written; don't act.
        """
        await self._record(event, subject=principal.subject, tenant=principal.tenant, **what)

    def sees_all_tenants(self, principal: Principal, client: Client) -> bool:
        """Whether the caller may see and touch what belongs to other tenants, too."""
        return self._policy.decide(principal, Permission.TENANTS, None, client).allowed

    def may_list(self, principal: Principal, model_id: str, client: Client) -> bool:
        """Whether the caller may see this model in the list."""
        glance = ModelRequest(WireFormat.CHAT, model_id, Chat(()), {})
        return self._policy.decide(principal, "model:model:list", glance, client).allowed
