"""One request's record: opened first, closed last, durable at both ends, whatever happens in between."""

from __future__ import annotations

import asyncio
import hmac
import time
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
)
from server.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

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
_DENIALS = (AuthenticationError, PermissionDeniedError, ContentBlockedError)


class Audit:
    """Opens records. One a gateway.

    Args:
        appender: Makes entries durable.
        text_key: At least 32 bytes; texts are named by HMAC under a key derived from it for each tenant.
        clock_ns: The wall clock.
        timer_ns: A clock that never steps.
    """

    def __init__(
        self,
        appender: AuditAppender,
        *,
        text_key: bytes,
        clock_ns: Callable[[], int] = time.time_ns,
        timer_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if len(text_key) < 32:
            raise ValueError("The audit text key needs at least 32 bytes.")
        self._appender = appender
        self._text_key = text_key
        self._tenant_keys: dict[str, hmac.HMAC] = {}
        self._tasks: set[asyncio.Task[int]] = set()
        self.clock_ns = clock_ns
        self.timer_ns = timer_ns

    def open(self, request_id: RequestId, wire_format: WireFormat | str, route: str, client: Client) -> Record:
        """Return the record of one request, to be held in `async with`.

        Args:
            request_id: Made by the gateway, unique; never the client's own.
            wire_format: How the request was spelled; free text for routes that reach no model.
            route: The route's pattern, not the raw path.
            client: Where it came from.
        """
        return Record(self, request_id, wire_format, route, client)

    def new_text_hmac(self, tenant: str) -> hmac.HMAC:
        """Return an empty HMAC-SHA-256 under the tenant's key."""
        keyed = self._tenant_keys.get(tenant)
        if keyed is None:
            if len(self._tenant_keys) >= _MAX_TENANTS:
                self._tenant_keys.clear()
            key = hmac.digest(self._text_key, b"strongroom audit text v1\x00" + tenant.encode(), "sha256")
            keyed = self._tenant_keys[tenant] = hmac.new(key, digestmod=sha256)
        return keyed.copy()

    async def append(self, entry: dict[str, Any]) -> int:
        """Make an entry durable even if the caller is cancelled meanwhile.

        Raises:
            AuditUnavailableError: The log cannot be written.
        """
        task = asyncio.ensure_future(self._appender.append(entry))
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return await asyncio.shield(task)

    def _settled(self, task: asyncio.Task[int]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever still waits gets it too, and a caller that left has nobody to tell


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
        "_model",
        "_opened_ns",
        "_partial",
        "_tenant",
        "accepted_index",
        "finished_index",
        "request_id",
    )

    def __init__(
        self, audit: Audit, request_id: RequestId, wire_format: WireFormat | str, route: str, client: Client
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
        self._partial = Outcome()
        self._is_opened = False
        self._is_closed = False
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
        self._model = {"model": clean_text(request.model, 128), "stream": request.stream}
        if request.classification is not None:
            self._model["classification"] = clean_text(request.classification, 64)
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

    async def accept(self, prompt: Prompt, scan: ScanReport, effective: dict[str, Any]) -> int:
        """Make the request's record durable; no token may be computed before this returns.

        Args:
            prompt: What goes to the engine.
            scan: The guard's verdict on what came in.
            effective: What `Model.describe` says: model, digest, and under `params` the parameters after clamping.

        Returns:
            The entry's index.

        Raises:
            AuditUnavailableError: The log cannot be written; the request gets 503.
        """
        if self._is_opened or self._is_closed:
            raise RuntimeError("A record is accepted once, before it is finished.")
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
        if prompt.stand_in is not None:
            entry["stand_in"] = prompt.stand_in
        if (shadow := prompt.shadow) is not None:
            entry["shadow_template"] = {"id": shadow.id, "version": shadow.version, "digest": shadow.digest}
        self._is_opened = True  # from here on the entry may be durable, answered or not
        self.accepted_index = await self._audit.append(entry)
        return self.accepted_index

    def count(self, deltas: list[Delta]) -> None:
        """Take note of what leaves: its keyed hash, its length, when the first of it left."""
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
                self._partial.absorb([delta])
        for index, said in parts.items():
            text = "".join(said)
            self._chars += len(text)
            keyed = self._answers.get(index)
            if keyed is None:
                keyed = self._answers[index] = self._audit.new_text_hmac(self._tenant)
            keyed.update(text.encode("utf-8", "surrogatepass"))

    async def finish(self, outcome: Outcome) -> int:
        """Make the outcome durable; the last bytes of the answer may leave when this returns.

        Returns:
            The entry's index.

        Raises:
            AuditUnavailableError: The log cannot be written; the answer ends with an error.
        """
        return await self._close(outcome, "")

    # The end, in every case ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_closed:
            return
        outcome = self._partial  # what was counted before the end that nobody planned
        reason = ""
        if error is None:
            outcome.error_code, reason = "not_finished", "the pipeline ended without an outcome"
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            outcome.status, reason = "aborted", "the client left or the server drained"
        elif isinstance(error, StrongroomError):
            outcome.status = "denied" if isinstance(error, _DENIALS) else "failed"
            outcome.error_code = error.code
            reason = error.reason if isinstance(error, AuthenticationError) else str(error)
        else:
            outcome.error_code, reason = "internal_error", type(error).__name__
        try:
            await self._refuse(error, outcome, reason) if not self._is_opened else await self._close(outcome, reason)
        except AuditUnavailableError:
            # With an error under way the caller hears of that one, and the writer closes the request as unknown; a
            # refusal alone must not be answered off the record.
            if not isinstance(error, AuditUnavailableError) and not self._is_opened and isinstance(error, Exception):
                raise

    async def _refuse(self, error: BaseException | None, outcome: Outcome, reason: str) -> None:
        self._is_closed = True
        entry = {
            **self._base,
            **self._model,
            **self._decision,
            "event": Event.REQUEST_REFUSED.value,
            "time": format_time(self._audit.clock_ns()),
            "outcome": "denied" if isinstance(error, RequestError) else outcome.status,
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
        self.finished_index = await self._audit.append(entry)

    async def _close(self, outcome: Outcome, reason: str) -> int:
        if self._is_closed or not self._is_opened:
            raise RuntimeError("A record is finished once, after it was accepted.")
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
        self.finished_index = await self._audit.append(entry)
        return self.finished_index


_FINDING_KEYS = frozenset({"rule", "category", "severity", "cwe", "line", "language"})


def _scan(report: ScanReport) -> dict[str, Any]:
    scan: dict[str, Any] = {"state": str(report.state)}
    if report.reason is not None:
        scan["reason"] = clean_text(report.reason, 128)
    if report.findings:
        scan["num_findings"] = len(report.findings)
        scan["findings"] = [
            {
                "rule": finding.rule,
                "category": finding.category,
                "severity": finding.severity,
                "cwe": finding.cwe,
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
