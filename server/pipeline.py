"""The data path of every request that reaches a model, top to bottom; read this first.

request → principal → decision → input scan → prompt (template, control tokens neutralised) → reservation →
**accepted, durable** → engine → output scan → text → **finished, durable** → last bytes.

Rooms never call each other: each takes a frozen value and returns one, and this page carries it on. Refusals are raised
where they are found; the audit record that opened first notes them on the way out.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from server.errors import (
    AuthenticationError,
    ContextLengthError,
    PermissionDeniedError,
    RateLimitedError,
    UnavailableError,
)
from server.types import Chat, Delta, Outcome, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from server.ports import Audit, Authenticator, Guard, Limits, Model, Models, Policy, Reservation
    from server.types import Client, Credentials, ModelRequest, Obligations, Principal, Prompt, RequestId, WireFormat


@dataclass(slots=True)
class Call:
    """One call of a route: what it offers, and what the pipeline tells it back."""

    id: RequestId
    wire_format: WireFormat
    route: str
    action: str
    credentials: Credentials
    client: Client
    read: Callable[[Call], Awaitable[ModelRequest]]  # is handed the call: one that closed over it would make a cycle
    request: ModelRequest | None = None
    prompt_tokens: int = 0
    model_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    principal: Principal | None = None
    may_store: bool = False
    is_whole: bool = False
    outcome: Outcome = field(default_factory=Outcome)


def canonical(request: ModelRequest, model: Model) -> ModelRequest:
    """Return the request under the model's own id: records and policies see one name, whatever alias was used."""
    return request if request.model == model.id else replace(request, model=model.id)


def follow_up(
    model: Model,
    request: ModelRequest,
    obligations: Obligations,
    principal: Principal,
    call: Call,
    reservation: Reservation,
) -> Callable[[str], Awaitable[str | None]] | None:
    """Return what puts one more user turn to the model in the same conversation; None where there are no turns.

    The template stands first there too. What the turn may cost is held before it runs, and what it costs is added to
    the request's usage; where limits or the context have no room for it the model is not asked, and it returns None.
    """
    chat = request.payload
    if not isinstance(chat, Chat):
        return None

    async def ask(instruction: str) -> str | None:
        turn = {"role": "user", "content": instruction}
        again = replace(
            request,
            payload=replace(chat, messages=(*chat.messages, turn), tools=(), tool_choice=None),
            sampling={name: value for name, value in request.sampling.items() if name != "n"},  # one is enough
        )
        prompt = await model.render(again, obligations, principal)
        try:
            max_tokens = model.clamp(again, prompt, obligations)
            async with reservation.extend(prompt_tokens=prompt.num_tokens, max_tokens=max_tokens) as charged:
                return await run(again, prompt, max_tokens, charged)
        except (ContextLengthError, RateLimitedError):
            return None

    async def run(again: ModelRequest, prompt: Prompt, max_tokens: int, charged: Usage) -> str:
        text: list[str] = []
        spent: Usage | None = None
        deltas = model.stream(prompt, again, max_tokens=max_tokens, principal=principal, request_id=call.id)
        try:
            async with aclosing(deltas):
                async for batch in deltas:
                    for delta in batch:
                        text.append(delta.text)
                        spent = delta.usage or spent
        except UnavailableError:
            spent = spent or (None if text else Usage())  # an engine that did not answer computed nothing
            raise
        finally:  # a caller who leaves now has cost it all the same
            said = "".join(text)
            charged.add(spent or Usage.of_cut_off(prompt.num_tokens, len(text), len(said)))
            call.outcome.extra_usage.add(charged)
        return said

    return ask


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The rooms, wired by `app.py`."""

    audit: Audit
    auth: Authenticator
    models: Models
    policy: Policy
    guard: Guard
    limits: Limits

    async def run(self, call: Call) -> AsyncGenerator[list[Delta], None]:
        """Yield the answer, a list of deltas for each piece the engine sent.

        The first list comes after the accepted record is durable, and `call.headers` is set by then. The deltas that
        end the answer come in the last list, after the finished record is durable. Closing the generator aborts the
        engine's work and records that the client left.

        Raises:
            StrongroomError: Whatever refused or failed; it is on record by then.
        """
        async with self.audit.open(call.id, call.wire_format, call.route, call.client, call.outcome) as record:
            principal = await self.auth.authenticate(call.credentials, call.client)
            record.identify(principal)
            call.principal = principal
            request = await call.read(call)
            model = self.models.find(request.model)
            call.model_id = model.id
            request = canonical(request, model)
            decision = self.policy.decide(principal, call.action, request, call.client)
            record.decide(decision, request)
            if not decision.allowed:
                raise PermissionDeniedError(decision.reason)
            call.may_store = decision.obligations.store_responses
            request, scan = await self.guard.admit(request, decision.obligations)
            prompt = await model.render(request, decision.obligations, principal)
            max_tokens = model.clamp(request, prompt, decision.obligations)
            call.request, call.prompt_tokens = request, prompt.num_tokens
            async with self.limits.reserve(
                principal, request, prompt_tokens=prompt.num_tokens, max_tokens=max_tokens
            ) as reservation:
                await record.accept(prompt, scan, model.describe(request, max_tokens))
                deltas = reservation.watch(
                    model.stream(prompt, request, max_tokens=max_tokens, principal=principal, request_id=call.id),
                    call.outcome,
                )
                ask = follow_up(model, request, decision.obligations, principal, call, reservation)
                released = self.guard.release(deltas, request, decision.obligations, call.outcome, ask=ask)
                call.headers |= reservation.headers
                call.headers |= {
                    "x-strongroom-template": f"{prompt.template.id}@{prompt.template.version}",
                    "x-strongroom-template-digest": prompt.template.digest,
                    "x-strongroom-input-scan": scan.state,
                    "x-strongroom-audit-index": str(await record.durable()),  # before it the engine gets nothing
                }
                ready: list[Delta] = []
                last: list[Delta] = []
                async with aclosing(deltas), aclosing(released):
                    async for batch in released:
                        if self.auth.is_revoked(principal):
                            raise AuthenticationError("revoked while the answer was running")
                        record.count(batch)
                        ready += [delta for delta in batch if delta.finish_reason is None and delta.usage is None]
                        if len(ready) < len(batch):
                            last += [d for d in batch if d.finish_reason is not None or d.usage is not None]
                        if ready and not (last and last[-1].usage):  # usage comes last: what is ready waits for no more
                            yield ready
                            ready = []
                call.outcome.status = "completed"
                reservation.settle(call.outcome)
                await record.finish(call.outcome)
                if ready:
                    yield ready  # while the log's disk is at work
                await record.durable()
                if call.outcome.code:
                    self.guard.look_deeper(call.id, call.outcome.code)
            call.is_whole = True
            yield last
