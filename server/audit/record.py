"""One request's record: opened first, closed last, durable at both ends, whatever happens in between."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import deque
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from server.audit.entry import ENTRY_VERSION, clean_text, format_time
from server.audit.tags import Event
from server.errors import (
    AuditUnavailableError,
    AuthenticationError,
    ContentBlockedError,
    PermissionDeniedError,
    RequestError,
    StrongroomError,
    SupersededError,
    ThrottledError,
)
from server.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from server.audit.texts import TenantKeys, TextStore
    from server.ports import AuditAppender
    from server.types import (
        Client,
        Decision,
        Delta,
        ModelRequest,
        Principal,
        Prompt,
        RequestId,
        ScanReport,
        WireFormat,
    )

_MAX_FINDINGS = 32
_MAX_TENANTS = 4_096
_MAX_UNCLOSED = 4_096
_DENIALS = (AuthenticationError, PermissionDeniedError, ContentBlockedError)


class Audit:
    """Opens records. One a gateway.

    Args:
        appender: Makes entries durable.
        text_key: At least 32 bytes; texts are named by HMAC under a key derived from it for each tenant.
        tenant_keys: Keys to use in its stead, one a tenant, which can be destroyed.
        texts: Where full texts go when policy asks for them; without it such a request is refused.
        clock_ns: The wall clock.
        timer_ns: A clock that never steps.

    Attributes:
        is_writable: Whether the newest append became durable; an alert hangs on it.
    """

    def __init__(
        self,
        appender: AuditAppender,
        *,
        text_key: bytes,
        tenant_keys: TenantKeys | None = None,
        texts: TextStore | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        timer_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if len(text_key) < 32:
            raise ValueError("The audit text key needs at least 32 bytes.")
        self._appender = appender
        self._text_key = text_key
        self._tenant_keys = tenant_keys
        self._texts = texts
        self._keyed: dict[str, tuple[bytes, hmac.HMAC]] = {}
        self._unclosed: deque[dict[str, Any]] = deque(maxlen=_MAX_UNCLOSED)
        self.is_writable = True
        self.clock_ns = clock_ns
        self.timer_ns = timer_ns

    def open(
        self,
        request_id: RequestId,
        wire_format: WireFormat | str,
        route: str,
        client: Client,
        outcome: Outcome | None = None,
    ) -> Record:
        """Return the record of one request, to be held in `async with`.

        Args:
            request_id: Made by the gateway, unique; never the client's own.
            wire_format: How the request was spelled; free text for routes that reach no model.
            route: The route's pattern, not the raw path.
            client: Where it came from.
            outcome: Where the request's end is noted as it becomes known; an unplanned end is recorded from it.
        """
        return Record(self, request_id, wire_format, route, client, outcome or Outcome())

    def new_text_hmac(self, tenant: str) -> hmac.HMAC:
        """Return an empty HMAC-SHA-256 under the tenant's key."""
        key = self._tenant_keys.get(tenant) if self._tenant_keys is not None else b""
        known, keyed = self._keyed.get(tenant, (None, None))
        if keyed is None or known != key:
            if len(self._keyed) >= _MAX_TENANTS:
                self._keyed.clear()
            secret = key or self._text_key
            keyed = hmac.new(
                hmac.digest(
                    secret, b"strongroom audit text v1\x00" + tenant.encode("utf-8", "surrogatepass"), "sha256"
                ),
                digestmod=sha256,
            )
            self._keyed[tenant] = key, keyed
        return keyed.copy()

    async def keep(self, tenant: str, request_id: str, kind: str, text: str) -> None:
        """Put a full text into the encrypted store, because policy asks for it.

        Raises:
            AuditUnavailableError: There is no store, or it can't be written.
        """
        if self._texts is None:
            raise AuditUnavailableError(
                "Policy wants the texts of this request kept, but no text store is set up; tell the operator."
            )
        await asyncio.to_thread(self._texts.put, tenant, request_id, kind, text)

    async def append(self, entry: dict[str, Any]) -> int:
        """Make an entry durable; it goes to the log even if the caller is cancelled meanwhile.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        return await self.durable(self.submit(entry))

    def submit(self, entry: dict[str, Any]) -> asyncio.Future[int]:
        """Send an entry to the log, for `durable` to wait for; it goes there whatever becomes of the caller.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        try:
            return self._appender.submit(entry)
        except AuditUnavailableError:
            self.is_writable = False
            raise

    def submit_end(self, entry: dict[str, Any]) -> asyncio.Future[int]:
        """Send the entry that closes a request; where the log does not take it, it is sent again once the log is back.

        Else a request would stand open there for as long as this process runs. One that was closed after all, or that
        the writer closed itself, it refuses: nothing is closed twice.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        try:
            sent = self.submit(entry)
        except AuditUnavailableError:
            self._unclosed.append(entry)
            raise
        sent.add_done_callback(lambda done: self._note_end(entry, done))
        return sent

    def _note_end(self, entry: dict[str, Any], done: asyncio.Future[int]) -> None:
        # Cancelled: its caller left before the answer, so nobody knows. Asked for in any case: seen is not unhandled.
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or (isinstance(error, AuditUnavailableError) and not error.is_refusal):
            self._unclosed.append(entry)

    def _close_again(self) -> None:
        entries = list(self._unclosed)
        self._unclosed.clear()
        for at, entry in enumerate(entries):
            try:
                self.submit_end(entry)
            except AuditUnavailableError:  # gone again; this one is back among them
                self._unclosed.extend(entries[at + 1 :])
                return

    async def durable(self, sent: asyncio.Future[int]) -> int:
        """Return the index of an entry that was submitted, once it is durable.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        try:
            index = await sent
        except AuditUnavailableError:
            self.is_writable = False
            raise
        self.is_writable = True
        if self._unclosed:
            self._close_again()
        return index


class Record:
    """What the log will say of one request. Hold it in `async with`; leaving without `finish` records why.

    Attributes:
        request_id: The request's id.
        accepted_index: The index of the accepted entry, once durable; the receipt's sequence number.
        finished_index: The index of the finished or refused entry, once durable.
    """

    __slots__ = (
        "_answers",
        "_audit",
        "_base",
        "_chars",
        "_decision",
        "_first_ns",
        "_is_closed",
        "_is_opened",
        "_kept",
        "_model",
        "_opened_ns",
        "_outcome",
        "_sent",
        "_tenant",
        "accepted_index",
        "finished_index",
        "request_id",
    )

    def __init__(
        self,
        audit: Audit,
        request_id: RequestId,
        wire_format: WireFormat | str,
        route: str,
        client: Client,
        outcome: Outcome,
    ) -> None:
        self._audit = audit
        self.request_id = request_id
        self._opened_ns = audit.timer_ns()
        self._base: dict[str, Any] = {
            "v": ENTRY_VERSION,
            "request_id": request_id,
            "wire_format": clean_text(str(wire_format), 64),
            "route": clean_text(route, 128),
            "client": {"address": clean_text(client.address, 64), "agent": clean_text(client.user_agent, 200)},
        }
        self._tenant = ""
        self._decision: dict[str, Any] = {}
        self._model: dict[str, Any] = {}
        self._answers: dict[int, hmac.HMAC] = {}
        self._chars = 0
        self._first_ns = 0
        self._outcome = outcome
        self._kept: list[str] | None = None
        self._is_opened = False
        self._is_closed = False
        self._sent: asyncio.Future[int] | None = None
        self.accepted_index: int | None = None
        self.finished_index: int | None = None

    # What is known, as it becomes known ---------------------------------------------------------------------------

    def identify(self, principal: Principal) -> None:
        """Say who the caller is."""
        self._tenant = principal.tenant
        self._base["principal"] = {
            "subject": clean_text(principal.subject, 200),
            "tenant": clean_text(principal.tenant, 128),
            "groups": [clean_text(group, 64) for group in sorted(principal.groups)[:16]],
            "method": principal.method,
            "credential": clean_text(principal.credential_id, 128),
        }

    def decide(self, decision: Decision, request: ModelRequest) -> None:
        """Say what policy decided of which request, a refusal too."""
        obligations = decision.obligations
        self._kept = [] if obligations.audit_text else None
        self._model = {"model": clean_text(request.model, 128), "stream": request.stream}
        if request.classification is not None:
            self._model["classification"] = clean_text(request.classification, 64)
        if request.continuation is not None and request.continuation.previous is not None:
            self._model["previous_response"] = clean_text(request.continuation.previous, 128)
        self._decision = {
            "policy": {
                "digest": decision.policy_digest,
                "ids": list(decision.policies[:16]),
                "reason": clean_text(decision.reason, 256),
            },
            "obligations": {
                "templates": list(obligations.templates[:16]),
                "stand_in": obligations.stand_in,
                "scan_input": str(obligations.scan_input),
                "scan_output": str(obligations.scan_output),
                "max_tokens": obligations.max_tokens,
                "audit_text": obligations.audit_text,
            },
        }
        if obligations.ban_tokens:
            words = [clean_text(word, 64) for word in obligations.ban_tokens[:64]]
            self._decision["obligations"]["ban_tokens"] = words

    async def accept(self, prompt: Prompt, scan: ScanReport, effective: dict[str, Any]) -> None:
        """Send the request's record to the log; no token may be computed before `durable` returns.

        Args:
            prompt: What goes to the engine.
            scan: The guard's verdict on what came in.
            effective: What `Model.describe` says: model, digest, and under `params` the parameters after clamping.

        Raises:
            AuditUnavailableError: The log cannot be written; the request gets 503.
        """
        if self._is_opened or self._is_closed:
            raise RuntimeError("A record is accepted once, before it is finished.")
        if self._kept is not None:
            await self._audit.keep(self._tenant, self.request_id, "prompt", prompt.text)
        keyed = self._audit.new_text_hmac(self._tenant)
        keyed.update(prompt.text.encode("utf-8", "surrogatepass"))
        template = prompt.template
        entry = {
            **self._base,
            **self._model,
            **self._decision,
            "event": Event.REQUEST_ACCEPTED.value,
            "time": format_time(self._audit.clock_ns()),
            **{key: _param(value) for key, value in effective.items() if key != "params"},
            "params": {key: _param(value) for key, value in list(effective.get("params", {}).items())[:32]},
            "template": {"id": template.id, "version": template.version, "digest": template.digest},
            "prompt": {"hmac": keyed.hexdigest(), "tokens": prompt.num_tokens},
            "scan_input": _scan(scan),
        }
        if prompt.shadow is not None:
            entry["shadow"] = {"id": prompt.shadow.id, "version": prompt.shadow.version, "digest": prompt.shadow.digest}
        if prompt.stand_in is not None:
            entry["stand_in"] = prompt.stand_in
        if prompt.banned_ids:
            entry["banned_tokens"] = list(prompt.banned_ids)
        self._is_opened = True  # from here on the entry may be durable, answered or not
        self._sent = self._audit.submit(entry)

    async def durable(self) -> int:
        """Wait until what `accept` or `finish` sent is durable; return its index.

        Raises:
            AuditUnavailableError: The log cannot be written; the request gets 503, or its answer ends with an error.
        """
        assert self._sent is not None  # noqa: S101 - the pipeline sends first
        index = await self._audit.durable(self._sent)
        if self._is_closed:
            self.finished_index = index
        else:
            self.accepted_index = index
        return index

    def count(self, deltas: list[Delta]) -> None:
        """Take note of what leaves: its keyed hash, its length, when the first of it left, how it ends."""
        if not self._first_ns:
            self._first_ns = self._audit.timer_ns()
        parts: dict[int, list[str]] = {}
        for delta in deltas:
            said = parts.setdefault(delta.index, [])
            if delta.reasoning:
                said.append(delta.reasoning)
            if delta.text:
                said.append(delta.text)
            if delta.tool_calls:
                said.extend(_spoken(delta.tool_calls))
            if delta.usage is not None or delta.finish_reason is not None:
                self._outcome.absorb([delta])
        for index, said in parts.items():
            text = "".join(said)
            if self._kept is not None:
                self._kept.append(text)
            self._chars += len(text)
            keyed = self._answers.get(index)
            if keyed is None:
                keyed = self._answers[index] = self._audit.new_text_hmac(self._tenant)
            keyed.update(text.encode("utf-8", "surrogatepass"))

    async def finish(self, outcome: Outcome) -> None:
        """Send the outcome to the log; the last bytes of the answer may leave when `durable` returns.

        Raises:
            AuditUnavailableError: The log cannot be written; the answer ends with an error.
        """
        if self._kept is not None:
            await self._audit.keep(self._tenant, self.request_id, "answer", "".join(self._kept))
        await self._close(outcome, "")

    # The end, in every case ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_closed:
            if self._sent is not None and not self._sent.done():  # the client left between `finish` and `durable`
                try:
                    await self.durable()
                except AuditUnavailableError:
                    if error is None:  # else the caller hears of that one, and the writer closes the request as unknown
                        raise
            return
        outcome = self._outcome  # what was counted before the end that nobody planned
        if isinstance(error, ThrottledError):  # a flood of them must not fill the log: they are put there in sums
            self._is_closed = True
            outcome.status, outcome.error_code = "denied", error.code
            return
        reason = ""
        if error is None:
            outcome.error_code, reason = "not_finished", "the pipeline ended without an outcome"
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            outcome.status, reason = "aborted", "the client left or the server drained"
        elif isinstance(error, SupersededError):
            outcome.status, outcome.error_code, reason = "aborted", error.code, str(error)
        elif isinstance(error, StrongroomError):
            outcome.status = "denied" if isinstance(error, _DENIALS) else "failed"
            outcome.error_code = error.code
            reason = error.reason if isinstance(error, AuthenticationError) else str(error)
        else:
            outcome.error_code, reason = "internal_error", type(error).__name__
        try:
            if self._is_opened:
                await self._close(outcome, reason)
            else:
                self._refuse(error, outcome, reason)
            await self.durable()
        except AuditUnavailableError:
            # With an error under way the caller hears of that one, and the writer closes the request as unknown; a
            # refusal alone must not be answered off the record.
            if not isinstance(error, AuditUnavailableError) and not self._is_opened and isinstance(error, Exception):
                raise

    def _refuse(self, error: BaseException | None, outcome: Outcome, reason: str) -> None:
        self._is_closed = True
        if isinstance(error, RequestError):
            outcome.status = "denied"
        entry = {
            **self._base,
            **self._model,
            **self._decision,
            "event": Event.REQUEST_REFUSED.value,
            "time": format_time(self._audit.clock_ns()),
            "outcome": outcome.status,
            "code": outcome.error_code or "",
            "reason": clean_text(reason, 256),
            "duration_us": (self._audit.timer_ns() - self._opened_ns) // 1_000,
        }
        if isinstance(error, AuthenticationError):
            entry["event"] = Event.CREDENTIAL_REFUSED.value
            if error.key_id is not None:
                entry["key_id"] = clean_text(error.key_id, 64)
        elif isinstance(error, ContentBlockedError):
            entry["findings"] = [
                {str(key): _param(value) for key, value in finding.items() if key in _FINDING_KEYS}
                for finding in error.findings[:_MAX_FINDINGS]
            ]
        self._sent = self._audit.submit(entry)

    async def _close(self, outcome: Outcome, reason: str) -> None:
        if self._is_closed or not self._is_opened:
            raise RuntimeError("A record is finished once, after it was accepted.")
        if self._sent is not None and not self._sent.done():  # refused between `accept` and `durable`
            await self.durable()
        self._is_closed = True
        now_ns = self._audit.timer_ns()
        usage = outcome.usage
        base = self._base
        entry: dict[str, Any] = {
            "v": ENTRY_VERSION,
            "request_id": self.request_id,
            "event": Event.REQUEST_FINISHED.value,
            "time": format_time(self._audit.clock_ns()),
            "route": base["route"],
            "outcome": outcome.status,
            "usage": {
                "prompt": usage.prompt_tokens,
                "completion": usage.completion_tokens,
                "cached": usage.cached_tokens,
            },
            "answer": {
                "chars": self._chars,
                "choices": len(self._answers),
                "hmac": [self._answers[index].hexdigest() for index in sorted(self._answers)[:16]],
            },
            "duration_us": (now_ns - self._opened_ns) // 1_000,
            "first_token_us": (self._first_ns - self._opened_ns) // 1_000 if self._first_ns else None,
            "accepted": self.accepted_index,
        }
        if principal := base.get("principal"):
            entry["principal"] = {"subject": principal["subject"], "tenant": principal["tenant"]}
        if self._model:
            entry["model"] = self._model["model"]
        if outcome.finish_reasons:
            entry["finish"] = [clean_text(outcome.finish_reasons[at], 32) for at in sorted(outcome.finish_reasons)[:16]]
        if outcome.scan is not None:
            entry["scan_output"] = _scan(outcome.scan)
        if outcome.error_code is not None:
            entry["code"] = clean_text(outcome.error_code, 64)
        if reason:
            entry["reason"] = clean_text(reason, 256)
        self._sent = self._audit.submit_end(entry)


_FINDING_KEYS = frozenset({"rule", "category", "severity", "cwe", "line", "language"})


def _scan(report: ScanReport) -> dict[str, Any]:
    scan: dict[str, Any] = {"state": str(report.state)}
    if report.reason is not None:
        scan["reason"] = clean_text(report.reason, 128)
    if report.findings:
        scan["num_findings"] = len(report.findings)
        scan["findings"] = [
            {
                "rule": clean_text(finding.rule, 96),
                "category": clean_text(finding.category, 32),
                "severity": clean_text(finding.severity, 16),
                "cwe": None if finding.cwe is None else clean_text(finding.cwe, 16),
                "where": None if finding.where is None else clean_text(finding.where, 64),
                "start": finding.start,
                "end": finding.end,
            }
            for finding in report.findings[:_MAX_FINDINGS]
        ]
    return scan


def _param(value: Any) -> Any:
    """Keep numbers and short words; a list or object (stop strings, logit bias) is named by its length alone."""
    if isinstance(value, float):
        return repr(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return clean_text(value, 64)
    return len(value) if isinstance(value, (list, tuple, dict)) else type(value).__name__


def _spoken(tool_calls: list[dict[str, Any]]) -> list[str]:
    said = []
    for call in tool_calls:
        function = call.get("function") or {}
        said += [str(function.get("name") or ""), str(function.get("arguments") or "")]
    return said
