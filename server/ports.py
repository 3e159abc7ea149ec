"""Protocols between the pipeline and its rooms; each room implements one, `app.py` wires them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from server.types import (
        Client,
        Credentials,
        Decision,
        Delta,
        ModelRequest,
        Obligations,
        Outcome,
        Principal,
        Prompt,
        RequestId,
        ScanReport,
        Usage,
        WireFormat,
    )


class Authenticator(Protocol):
    """Credentials to a principal."""

    async def authenticate(self, credentials: Credentials, client: Client) -> Principal:
        """Return who the caller is.

        Raises:
            AuthenticationError: No credential, or none that is valid.
            RateLimitedError: Too many failures from this address.
        """
        ...

    def is_revoked(self, principal: Principal) -> bool:
        """Whether the credential behind `principal` was revoked or ran out since; asked while a stream runs.

        Raises:
            UnavailableError: It can't be told.
        """
        ...


class Policy(Protocol):
    """(principal, request) to a decision; pure, deny by default."""

    def decide(self, principal: Principal, action: str, request: ModelRequest, client: Client) -> Decision:
        """Return the decision with its reason; never raises for a refusal."""
        ...


class Limits(Protocol):
    """Reserve before, settle after."""

    def reserve(
        self, principal: Principal, request: ModelRequest, *, prompt_tokens: int, max_tokens: int
    ) -> AbstractAsyncContextManager[Reservation]:
        """Hold what the request may cost; on exit what was not settled is given back.

        Raises:
            RateLimitedError: A limit or a budget is spent.
        """
        ...


class Reservation(Protocol):
    """What a request holds of its limits while it runs."""

    headers: dict[str, str]

    def watch(self, deltas: AsyncGenerator[list[Delta], None], outcome: Outcome) -> AsyncGenerator[list[Delta], None]:
        """Yield what the engine says and count it, so that an answer that is never settled is charged all the same.

        What is charged then stands in `outcome`, so that log, metrics and usage say the same.
        """
        ...

    def extend(self, *, prompt_tokens: int, max_tokens: int) -> AbstractAsyncContextManager[Usage]:
        """Hold what one more turn may cost; on exit what the caller put into the usage is charged, as part of it all.

        Raises:
            RateLimitedError: On entering: no limit holds it.
        """
        ...

    def settle(self, outcome: Outcome) -> None:
        """Replace the reservation by what was really used."""
        ...


class PromptRenderer(Protocol):
    """Template and client text to token ids, exactly; lives with one model's tokenizer."""

    def render(self, request: ModelRequest, obligations: Obligations, principal: Principal) -> Prompt:
        """Return the prompt with the security template first and client text neutralised.

        Raises:
            RequestError: The text can't be rendered without control tokens of the client's making.
            ConfigError: The obligation names a template that is not loaded.
        """
        ...


class Guard(Protocol):
    """Scans what goes in and what comes out."""

    async def admit(self, request: ModelRequest, obligations: Obligations) -> tuple[ModelRequest, ScanReport]:
        """Scan client text; return the request (redacted where policy says so) and the report.

        Raises:
            ContentBlockedError: Policy blocks what was found.
        """
        ...

    def release(
        self,
        deltas: AsyncIterator[list[Delta]],
        request: ModelRequest,
        obligations: Obligations,
        outcome: Outcome,
        *,
        ask: Callable[[str], Awaitable[str | None]] | None = None,
    ) -> AsyncGenerator[list[Delta], None]:
        """Yield what may leave now; sets `outcome.scan` before the last batch.

        `ask` puts one more user turn to the model in the same conversation and returns its text, or None where there is
        no room for one; `repair` uses it.

        Raises:
            ContentBlockedError: Policy blocks what was found; nothing of the finding has left.
        """
        ...

    def look_deeper(self, request_id: str, blocks: tuple[tuple[str, str | None], ...]) -> None:
        """Have the code of an answer that has ended scanned again, later, for a record of its own; returns at once."""
        ...


class Engine(Protocol):
    """One model's engine, local or remote."""

    model: str
    max_model_len: int

    @property
    def ready(self) -> bool:
        """Whether it passed its self-test and has not gone away since."""
        ...

    def stream(
        self, prompt: Prompt, request: ModelRequest, *, max_tokens: int, cache_salt: str, request_id: RequestId
    ) -> AsyncGenerator[list[Delta], None]:
        """Return what the engine says, a list for each read of its socket; closing the generator aborts the request.

        Nothing goes to the engine before the first list is asked for; usage comes last, with the answer's end.

        Raises:
            EngineUnavailableError: The engine is not ready.
            EngineError: It failed on this request.
        """
        ...


class Model(Protocol):
    """One served model: its engine, its tokenizer, its limits."""

    @property
    def id(self) -> str:
        """The id that records and policies know it by."""
        ...

    async def render(self, request: ModelRequest, obligations: Obligations, principal: Principal) -> Prompt:
        """As `PromptRenderer.render`; long texts are rendered off the event loop.

        Raises:
            RequestError: The text can't be rendered without control tokens of the client's making.
        """
        ...

    def clamp(self, request: ModelRequest, prompt: Prompt, obligations: Obligations) -> int:
        """Return how many tokens the answer may have.

        Raises:
            ContextLengthError: The prompt alone does not fit.
        """
        ...

    def describe(self, request: ModelRequest, max_tokens: int) -> dict[str, Any]:
        """Return model id, digest and effective parameters for the audit record."""
        ...

    def stream(
        self, prompt: Prompt, request: ModelRequest, *, max_tokens: int, principal: Principal, request_id: RequestId
    ) -> AsyncGenerator[list[Delta], None]:
        """As `Engine.stream`, with the tenant's own cache salt."""
        ...


class Models(Protocol):
    """The models behind the address."""

    def find(self, name: str) -> Model:
        """Return the model of this id or alias.

        Raises:
            ModelNotFoundError: There is none.
        """
        ...


class Record(Protocol):
    """One request's audit record, from its first byte to its last."""

    def identify(self, principal: Principal) -> None:
        """Note who the caller is."""
        ...

    def decide(self, decision: Decision, request: ModelRequest) -> None:
        """Note what was asked and what policy said."""
        ...

    async def accept(self, prompt: Prompt, scan: ScanReport, effective: dict[str, Any]) -> None:
        """Send the accepted record to the log; `durable` says when it is there.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        ...

    async def durable(self) -> int:
        """Wait until what was sent last is durable; return its index in the log.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        ...

    def count(self, deltas: list[Delta]) -> None:
        """Note what was released."""
        ...

    async def finish(self, outcome: Outcome) -> None:
        """Send the outcome to the log; `durable` says when it is there.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        ...


class Audit(Protocol):
    """Opens a record for every request."""

    def open(
        self, request_id: RequestId, wire_format: WireFormat, route: str, client: Client, outcome: Outcome
    ) -> AbstractAsyncContextManager[Record]:
        """Return a context that writes the outcome on exit, whatever ended the request."""
        ...


class AuditAppender(Protocol):
    """Where records become durable."""

    def submit(self, entry: dict[str, Any]) -> asyncio.Future[int]:
        """Send an entry; the future has its index in the log once it is durable, or an `AuditUnavailableError`.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        ...
