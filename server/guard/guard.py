"""The guard as the pipeline sees it: what goes in is admitted, what comes out is released."""

from __future__ import annotations

import asyncio
import secrets as randomness
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.guard import characters, release, scan
from server.guard.workers import WorkerPool
from server.types import Chat, Completion, Embedding, Finding, ScanMode, ScanReport, ScanState, Secret

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from server.guard.deeper import DeeperScanner
    from server.guard.scan import CodeScan
    from server.types import Delta, ModelRequest, Obligations, Outcome


class Guard:
    """Scans what goes in and what comes out.

    Args:
        num_workers: Processes that judge code blocks; they start at the first block.
        timeout_s: Time one block may take before it counts as unscanned.
        memory_bytes: Address space a worker may have.
        max_repairs: How often `repair` asks the model again for one answer.
        rules: The folder of `configs/guard`; None for the one that ships with the source.
        deeper: Looks at the code of answers once more, when they have ended; None for no second look.
    """

    def __init__(
        self,
        *,
        num_workers: int = 2,
        timeout_s: float = 2.0,
        memory_bytes: int = 2 << 30,
        max_repairs: int = 2,
        rules: Path | None = None,
        deeper: DeeperScanner | None = None,
    ) -> None:
        self._pool = WorkerPool(num_workers=num_workers, timeout_s=timeout_s, memory_bytes=memory_bytes, rules=rules)
        self._max_repairs = max_repairs
        self._deeper = deeper

    async def warm(self) -> None:
        """Start a worker, so that the first block does not wait for one."""
        await self._pool.warm()

    def take_failures(self) -> dict[str, int]:
        """Return how many scans of code failed since the last call, by cause."""
        taken = dict(self._pool.failures)
        self._pool.failures.clear()
        return taken

    def look_deeper(self, request_id: str, blocks: tuple[tuple[str, str | None], ...]) -> None:
        """Have the code of an answer that has ended scanned again, later, for a record of its own; returns at once."""
        if self._deeper is not None:
            self._deeper.submit(request_id, blocks)

    async def run_deeper(self, record: Callable[..., Awaitable[Any]]) -> None:
        """Do what `look_deeper` asked for, until cancelled."""
        if self._deeper is not None:
            await self._deeper.run(record)

    async def close(self) -> None:
        """Stop the workers."""
        await self._pool.close()

    async def scan(self, text: str, *, language: str | None = None, path: str | None = None) -> ScanReport:
        """Return the verdict on one text, code judged by the workers; what `/v1/scan` answers."""
        verdicts: dict[tuple[str, str | None], CodeScan] = {}
        if len(text) <= scan.MAX_SCAN_CHARS:
            for _, source, label in scan.code_blocks(text, language=language, path=path):
                verdicts[source, label] = await self._pool.scan_code(source, label)
        return await asyncio.to_thread(
            scan.judge, text, language=language, path=path, scan_code=lambda source, label: verdicts[source, label]
        )

    async def admit(self, request: ModelRequest, obligations: Obligations) -> tuple[ModelRequest, ScanReport]:
        """Scan client text; return the request (redacted where policy says so) and the report.

        `repair` has no meaning for what goes in and acts as `redact`.

        Raises:
            ContentBlockedError: Policy blocks what was found.
        """
        mode = obligations.scan_input
        if mode is ScanMode.OFF:
            return request, release.OFF
        texts = list(_client_texts(request))
        if sum(len(text) for _, text, _ in texts) > 64_000:
            findings = await asyncio.to_thread(_scan_input, texts)
        else:
            findings = _scan_input(texts)
        report = ScanReport(ScanState.FINDINGS if findings else ScanState.CLEAN, tuple(findings))
        if not findings or mode is ScanMode.ANNOTATE:
            return request, report
        if mode is ScanMode.BLOCK:
            raise release.blocked(report)
        return _redacted(request, texts, findings), report

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

        Args:
            deltas: What the engine says.
            request: As `admit` returned it.
            obligations: `scan_output` is the mode.
            outcome: Gets the verdict on the whole answer.
            ask: For `repair`: takes an instruction, asks the model in the same conversation, returns its text; None
                where there is no room for one more turn. Without it `repair` blocks.

        Raises:
            ContentBlockedError: Policy blocks what was found; nothing of the finding has left.
        """
        return release.released(
            deltas,
            request,
            obligations.scan_output,
            outcome,
            scan_code=self._pool.scan_code if self._deeper is None else _noting(self._pool, outcome),
            repair=None if ask is None else _repairer(ask, self._max_repairs),
        )


def _noting(pool: WorkerPool, outcome: Outcome) -> Callable[[str, str | None], Awaitable[CodeScan]]:
    """Return the pool's scan, which notes what it judged."""

    async def scan_code(source: str, language: str | None) -> CodeScan:
        if (source, language) not in outcome.code:
            outcome.code = (*outcome.code, (source, language))
        return await pool.scan_code(source, language)

    return scan_code


def _repairer(ask: Callable[[str], Awaitable[str | None]], max_repairs: int) -> release.Repair:
    left = max_repairs

    async def repair(source: str, findings: tuple[Finding, ...]) -> str | None:
        nonlocal left
        if left <= 0:
            return None
        left -= 1
        listed = "\n".join(
            f"- line {f.line or 1}: {f.cwe or f.rule}: {f.message} {f.fix or ''}".rstrip() for f in findings
        )
        answer = await ask(
            "A scanner found these weaknesses in the code block below. Write the whole block again without them, "
            f"keep what it does, and answer with one fenced code block only.\n\n{listed}\n\n```\n{source}```"
        )
        blocks = [] if answer is None else scan.code_blocks(answer)
        return blocks[0][1] if blocks else None

    return repair


def _client_texts(request: ModelRequest) -> list[tuple[str, str, bool]]:
    """Return (where, text, whether it is data that must not speak to the model) for every string a client sent."""
    payload = request.payload
    if isinstance(payload, Completion):
        return [("prompt", payload.prompt, False), *([("suffix", payload.suffix, False)] if payload.suffix else [])]
    if isinstance(payload, Embedding):
        return [(f"input[{i}]", text, False) for i, text in enumerate(payload.inputs)]
    found: list[tuple[str, str, bool]] = []
    for i, message in enumerate(payload.messages):
        data = message.get("role") == "tool"
        found += [(f"messages[{i}]{path}", text, data) for path, text in _leaves(message, "")]
    for i, tool in enumerate(payload.tools):
        found += [(f"tools[{i}]{path}", text, True) for path, text in _leaves(tool, "")]
    return found


# What the wire format's parser has written or bounded itself; below a tool's `parameters` such names are the caller's.
_FIXED_KEYS = frozenset({"role", "type", "id", "tool_call_id"})
_OUR_KEYS = frozenset(
    {"content", "name", "reasoning_content", "tool_calls", "function", "arguments", "description", "parameters"}
)


def _leaves(value: Any, path: str, fixed: frozenset[str] = _FIXED_KEYS) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(path, value)]
    if isinstance(value, dict):
        found: list[tuple[str, str]] = []
        for n, (key, item) in enumerate(value.items()):
            if key in fixed:
                continue
            if not fixed:
                found.append((f"{path}.names[{n}]", key))
            found += _leaves(item, f"{path}.{_step(n, key, fixed)}", _below(key, fixed))
        return found
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in _leaves(v, f"{path}[{i}]", fixed)]
    return []


def _step(number: int, key: str, fixed: frozenset[str]) -> str:
    """Return a key's part of a path: the caller's own go by number, for paths stand in records and answers."""
    return key if fixed and key in _OUR_KEYS else str(number)


def _below(key: str, fixed: frozenset[str]) -> frozenset[str]:
    return frozenset() if key == "parameters" else fixed


def _scan_input(texts: list[tuple[str, str, bool]]) -> list[Finding]:
    findings: list[Finding] = []
    for where, text, is_data in texts:
        found = scan.find_anywhere(text)
        if is_data or len(text) > 2000:  # a long message is a pasted document
            found += characters.find_injection(text)
        findings += [replace(f, where=where) for f in scan.report_of(text, found).findings]
    return findings


def _redacted(request: ModelRequest, texts: list[tuple[str, str, bool]], findings: list[Finding]) -> ModelRequest:
    """Return the request with each credential replaced by a random placeholder; hidden characters are taken out."""
    by_where = {where: text for where, text, _ in texts}
    placeholders: dict[str, str] = {}
    edited: dict[str, str] = {}
    for where in {f.where for f in findings if f.where}:
        text = by_where[where]
        for finding in sorted((f for f in findings if f.where == where), key=lambda f: -f.start):
            value = text[finding.start : finding.end]
            if finding.category == "secret":
                mark = placeholders.setdefault(value, f"REDACTED_{randomness.token_hex(8)}")
                text = text[: finding.start] + mark + text[finding.end :]
            elif finding.category == "characters":
                text = text[: finding.start] + text[finding.end :]
        edited[where] = text
    redactions = tuple((mark, Secret(value)) for value, mark in placeholders.items())
    return replace(request, payload=_replaced(request.payload, edited), redactions=redactions)


def _replaced(payload: Chat | Completion | Embedding, edited: dict[str, str]) -> Chat | Completion | Embedding:
    if isinstance(payload, Completion):
        return replace(
            payload, prompt=edited.get("prompt", payload.prompt), suffix=edited.get("suffix", payload.suffix)
        )
    if isinstance(payload, Embedding):
        return replace(payload, inputs=tuple(edited.get(f"input[{i}]", text) for i, text in enumerate(payload.inputs)))
    messages = tuple(_rewritten(m, f"messages[{i}]", edited) for i, m in enumerate(payload.messages))
    tools = tuple(_rewritten(t, f"tools[{i}]", edited) for i, t in enumerate(payload.tools))
    return replace(payload, messages=messages, tools=tools)


def _rewritten(value: Any, path: str, edited: dict[str, str], fixed: frozenset[str] = _FIXED_KEYS) -> Any:
    if isinstance(value, str):
        return edited.get(path, value)
    if isinstance(value, dict):
        return {
            (key if fixed else edited.get(f"{path}.names[{n}]", key)): item
            if key in fixed
            else _rewritten(item, f"{path}.{_step(n, key, fixed)}", edited, _below(key, fixed))
            for n, (key, item) in enumerate(value.items())
        }
    if isinstance(value, list):
        return [_rewritten(v, f"{path}[{i}]", edited, fixed) for i, v in enumerate(value)]
    return value
