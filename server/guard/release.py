"""What may leave of an answer, and when: one stream of deltas in, the same deltas out, held back, cut or rewritten."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.errors import ContentBlockedError, EngineError
from server.guard import languages, scan
from server.guard.hold import TextHold
from server.guard.lines import LineHold
from server.types import Completion, Delta, Finding, ScanMode, ScanReport, ScanState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from server.guard.fences import Segment
    from server.guard.scan import CodeScan
    from server.types import ModelRequest, Outcome

    CodeScanner = Callable[[str, str | None], Awaitable[CodeScan]]
    Repair = Callable[[str, tuple[Finding, ...]], Awaitable[str | None]]

_HOLDING = frozenset({ScanMode.BLOCK, ScanMode.REDACT, ScanMode.REPAIR})
OFF = ScanReport(ScanState.UNSCANNED, reason="scanning is switched off by policy")
UNFINISHED = ScanReport(ScanState.UNSCANNED, reason="the answer ended before it was scanned")


class Channel:
    """One text of a choice (its content or its reasoning): how far it may leave, and what is replaced in it."""

    def __init__(self, where: str, mode: ScanMode, hold: TextHold | LineHold, restored: dict[str, str]) -> None:
        self.where = where
        self.hold = hold
        self.edits: list[tuple[int, int, str]] = []
        self._mode = mode
        self._restored = restored
        self.sent = 0
        self._verdicts: dict[tuple[str, str | None], asyncio.Future[CodeScan]] = {}

    @property
    def safe(self) -> int:
        """Release may go this far."""
        return self.hold.safe

    def cancel(self) -> None:
        """Forget the verdicts that are still awaited."""
        for task in self._verdicts.values():
            task.cancel()

    async def settle(self, scan_code: CodeScanner, repair: Repair | None) -> None:
        """Judge the blocks that have closed, and deal with what was found in front of `safe`."""
        while self.hold.closed:
            segment = self.hold.closed[0]
            if self._mode is not ScanMode.OFF:
                await self._settle_block(segment, scan_code, repair)
            self.hold.settle(segment)
        self._settle_prose()

    async def judge(self, scan_code: CodeScanner, language: str | None) -> ScanReport:
        """Return the verdict on the whole text, which has ended."""
        text, segments = self.hold.text, self.hold.segments
        if segments is None or language is not None:
            blocks = scan.code_blocks(text, language=language)
        else:
            blocks = scan.blocks_of(text, segments)
        for _, source, label in blocks:
            await self._verdict(source, label, scan_code)
        report = scan.judge(text, blocks=blocks, scan_code=lambda source, label: self._verdicts[source, label].result())
        return _placed(report, self.where)

    def edit_all(self, report: ScanReport) -> None:
        """Redact what the whole-text verdict names and nothing has replaced yet (a raw completion is judged whole)."""
        for finding in report.findings:
            if not any(start <= finding.start < end for start, end, _ in self.edits):
                self.edits.append((max(finding.start, self.sent), finding.end, f"[removed: {finding.rule}]"))

    def restore(self) -> None:
        """Plan to put the redacted values of the request back where the answer names their placeholders."""
        text = self.hold.text if self._restored else ""
        for placeholder, value in self._restored.items():
            at = text.find(placeholder, self.sent)
            while at >= 0:
                if not any(start <= at < end for start, end, _ in self.edits):
                    self.edits.append((at, at + len(placeholder), value))
                at = text.find(placeholder, at + 1)

    def cut(self, text: str) -> str:
        """Take the next `len(text)` characters of this channel and return them as they may leave."""
        start, end = self.sent, self.sent + len(text)
        self.sent = end
        if not self.edits:
            return text
        out: list[str] = []
        position = start
        for first, last, replacement in sorted(self.edits):
            if last <= position or first >= end:
                continue
            out.append(text[position - start : max(0, first - start)])
            if first >= start:
                out.append(replacement)
            position = min(end, last)
        out.append(text[position - start :])
        return "".join(out)

    async def _settle_block(self, segment: Segment, scan_code: CodeScanner, repair: Repair | None) -> None:
        source = self.hold.text[segment.body_start : segment.body_end]
        label = languages.by_label(segment.label)
        verdict = self._verdict(source, label, scan_code)
        if self._mode not in _HOLDING:
            return  # nothing waits for it before the end
        found, reason = await verdict
        whole = self.hold.text[segment.start : segment.end]
        findings = [
            *scan.shifted(found, segment.body_start),
            *scan.shifted(scan.find_anywhere(whole), segment.start),
        ]
        if reason is not None:
            raise blocked(ScanReport(ScanState.UNSCANNED, tuple(findings), reason))
        if not findings:
            return
        if self._mode is ScanMode.REPAIR and repair is not None:
            better = await self._repaired(source, label, found, scan_code, repair)
            if better is not None:
                self.edits.append((segment.body_start, segment.body_end, better))
                return
        if self._mode is not ScanMode.REDACT:
            raise blocked(ScanReport(ScanState.FINDINGS, tuple(findings)))
        for finding in findings:
            self.edits.append((finding.start, finding.end, f"[removed: {finding.rule}]"))

    def _verdict(self, source: str, label: str | None, scan_code: CodeScanner) -> asyncio.Future[CodeScan]:
        verdict = self._verdicts.get((source, label))
        if verdict is None:
            verdict = self._verdicts[source, label] = asyncio.ensure_future(scan_code(source, label))
        return verdict

    async def _repaired(
        self, source: str, label: str | None, found: tuple[Finding, ...], scan_code: CodeScanner, repair: Repair
    ) -> str | None:
        """Ask for a better block until one is clean or the asker gives up."""
        while (answer := await repair(source, found)) is not None:
            source = answer if answer.endswith("\n") else answer + "\n"
            found, reason = await scan_code(source, label)
            if reason is None and not found and not scan.find_anywhere(source):
                return source
        return None

    def _settle_prose(self) -> None:
        if self._mode not in _HOLDING:
            return
        due = [f for f in self.hold.findings if self.sent <= f.start < self.hold.safe]
        if not due:
            return
        if self._mode is ScanMode.BLOCK:
            raise blocked(ScanReport(ScanState.FINDINGS, tuple(due)))
        for finding in due:
            if not any(start <= finding.start < end for start, end, _ in self.edits):
                self.edits.append((finding.start, finding.end, f"[removed: {finding.rule}]"))


class Choice:
    """One choice of an answer: its deltas in order, its texts, its tool calls."""

    def __init__(self, index: int, request: ModelRequest, mode: ScanMode) -> None:
        restored = {placeholder: value.reveal() for placeholder, value in request.redactions}
        raw = isinstance(request.payload, Completion)
        self.index = index
        self.finished = False
        self.report: ScanReport | None = None
        self._mode = mode
        self._raw = raw
        self._prompt = request.payload.prompt if isinstance(request.payload, Completion) else ""
        self._queue: deque[Delta] = deque()
        self._arguments: dict[int, list[str]] = {}
        self._holds_tools = mode in _HOLDING
        hold: TextHold | LineHold
        if mode is ScanMode.ANNOTATE and not raw and not restored:
            hold = LineHold()
        else:
            passive = mode not in _HOLDING and not restored
            hold = TextHold(whole_is_code=raw and mode in _HOLDING, placeholders=tuple(restored), passive=passive)
        self.content = Channel(f"choices[{index}].content", mode, hold, restored)
        self.reasoning: Channel | None = None  # most answers have none
        self.channels = [self.content]

    def push(self, deltas: list[Delta]) -> None:
        """Take the next deltas. Their text is looked at as one piece: what may leave does not depend on the cuts."""
        self._queue.extend(deltas)
        text = "".join([delta.text for delta in deltas])
        if text:
            self.content.hold.push(text)
        for delta in [delta for delta in deltas if delta.reasoning or delta.tool_calls]:
            if delta.reasoning:
                self._reasoning().hold.push(delta.reasoning)
            for call in delta.tool_calls or ():
                function = call.get("function") or {}
                self._arguments.setdefault(call.get("index", 0), []).append(function.get("arguments") or "")

    def cancel(self) -> None:
        """Forget what is still being judged."""
        for channel in self.channels:
            channel.cancel()

    async def settle(self, scan_code: CodeScanner, repair: Repair | None) -> None:
        """Judge what has closed since the last call."""
        for channel in self.channels:
            if channel.hold.closed or channel.hold.findings:
                await channel.settle(scan_code, repair)
        self.content.restore()

    async def finish(self, scan_code: CodeScanner, repair: Repair | None) -> ScanReport:
        """Say that the answer has ended; judge all of it and let the rest go, or raise."""
        self.finished = True
        if self._mode is ScanMode.OFF:
            self.content.hold.finish()
            self.content.restore()
            self.report = OFF
            return OFF
        for channel in self.channels:
            channel.hold.finish()
            if not self._raw:
                await channel.settle(scan_code, repair)
        language = None
        if self._raw:
            guessed = languages.guess(self._prompt + self.content.hold.text)
            language = guessed or "text"
        reports = [await self.content.judge(scan_code, language if language in languages.LANGUAGES else None)]
        if self.reasoning is not None:
            reports.append(await self.reasoning.judge(scan_code, None))
        if self._arguments:
            reports.append(await self._judge_tools(scan_code))
        report = self.report = scan.merged(reports)
        unscanned = report.state is ScanState.UNSCANNED
        left = [f for f in report.findings if f.where and "tool_calls" in f.where]
        if self._mode in _HOLDING and unscanned:
            raise blocked(report)
        if report.findings and (
            self._mode is ScanMode.BLOCK or (self._mode is ScanMode.REPAIR and (left or self._raw))
        ):
            raise blocked(report)
        if self._mode is ScanMode.REDACT:
            self.content.edit_all(reports[0])
            if self.reasoning is not None:
                self.reasoning.edit_all(reports[1])
            if left:
                raise blocked(report)  # arguments are machine-read: a hole in them is worse than none at all
        self.content.restore()
        return report

    def take(self) -> list[Delta]:
        """Return the deltas that may leave now."""
        out: list[Delta] = []
        queue, content = self._queue, self.content
        if (
            content.safe == content.hold.num_chars
            and not content.edits
            and self.reasoning is None
            and (self.finished or not self._holds_tools)
        ):
            out.extend(queue)  # nothing holds anything back, as for nearly every answer
            queue.clear()
            content.sent = content.hold.num_chars
            return out
        while queue:
            head = queue[0]
            if head.finish_reason is not None and not self.finished:
                break
            if (head.tool_calls or head.logprobs) and self._holds_tools and not self.finished:
                break  # log-probabilities spell tokens, even some whose text the engine itself still holds back
            room = self.content.safe - self.content.sent
            think = self.reasoning.safe - self.reasoning.sent if self.reasoning is not None else 0
            if len(head.text) <= room and len(head.reasoning) <= think:
                queue.popleft()
                if self._holds_tools and any(channel.edits for channel in self.channels):
                    head.logprobs = None  # they would spell what was taken out
                if head.text and (self.content.edits):
                    head.text = self.content.cut(head.text)
                else:
                    self.content.sent += len(head.text)
                if head.reasoning:
                    head.reasoning = self._reasoning().cut(head.reasoning)
                out.append(head)
                continue
            text, thought = head.text[: max(0, room)], head.reasoning[: max(0, think)]
            if text or thought:  # the rest, with log-probabilities and all, follows when it may
                head.text, head.reasoning = head.text[len(text) :], head.reasoning[len(thought) :]
                out.append(Delta(self.index, self.content.cut(text), self._reasoning().cut(thought) if thought else ""))
            break
        return out

    def _reasoning(self) -> Channel:
        if self.reasoning is None:
            hold = TextHold(passive=self._mode not in _HOLDING)
            self.reasoning = Channel(f"choices[{self.index}].reasoning", self._mode, hold, {})
            self.channels.append(self.reasoning)
        return self.reasoning

    async def _judge_tools(self, scan_code: CodeScanner) -> ScanReport:
        reports = []
        for position, parts in self._arguments.items():
            where = f"choices[{self.index}].tool_calls[{position}]"
            reports.append(_placed(await judge_arguments("".join(parts), scan_code), where))
        return scan.merged(reports)


_PATH_KEYS = ("path", "file_path", "filepath", "filename", "file", "target_file", "absolute_path", "relative_path")
_COMMAND_KEYS = frozenset({"command", "cmd", "script", "commands"})


async def judge_arguments(arguments: str, scan_code: CodeScanner) -> ScanReport:
    """Return the verdict on one tool call's arguments."""
    findings = list(scan.find_anywhere(arguments))
    reasons: list[str] = []
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = None
    path = (
        next((values[k] for k in _PATH_KEYS if isinstance(values.get(k), str)), None)
        if isinstance(values, dict)
        else None
    )
    for key, value in _strings(values, ""):
        found: list[Finding] = list(scan.find_anywhere(value))
        language = "shell" if key in _COMMAND_KEYS else languages.by_path(path)
        if language is None and "\n" in value:
            language = languages.guess(value)
        if (
            language is not None
            and key not in _PATH_KEYS
            and (key in _COMMAND_KEYS or "\n" in value or len(value) > 40)
        ):
            more, reason = await scan_code(value, language)
            found.extend(more)
            if reason is not None:
                reasons.append(reason)
        known = {f.rule for f in findings}
        findings.extend(replace(f, start=0, end=len(arguments)) for f in found if f.rule not in known)
    return scan.report_of(arguments, findings, reasons)


def _strings(value: Any, key: str) -> list[tuple[str, str]]:
    stack, found = [(key, value)], []
    while stack:
        name, item = stack.pop()
        if isinstance(item, str):
            found.append((name, item))
        elif isinstance(item, dict):
            stack.extend((str(k), v) for k, v in item.items())
        elif isinstance(item, list):
            stack.extend((name, v) for v in item)
    return found


class TextBlockedError(ContentBlockedError):
    """The guard's own: carries the report to the outcome, so that the audit record has it."""

    def __init__(self, message: str, report: ScanReport) -> None:
        super().__init__(message, findings=_plain(report))
        self.report = report
        if report.state is ScanState.UNSCANNED:
            self.code = "content_unscanned"


def blocked(report: ScanReport) -> TextBlockedError:
    """Return the error that says what was found, by rule; it carries the findings without any text."""
    if report.state is ScanState.UNSCANNED:
        return TextBlockedError(
            f"The text was not released: it could not be scanned ({report.reason}), and policy lets only scanned text "
            "pass. Try again; tell your administrator if it stays so.",
            report,
        )
    rules = ", ".join(dict.fromkeys(finding.rule for finding in report.findings))
    return TextBlockedError(
        f"The text was not released: the guard found {rules}, which policy blocks. Ask for it without that.", report
    )


def _placed(report: ScanReport, where: str) -> ScanReport:
    if not report.findings:
        return report
    return replace(report, findings=tuple(replace(f, where=where) for f in report.findings))


def _plain(report: ScanReport) -> tuple[dict[str, object], ...]:
    names = ("rule", "category", "severity", "message", "cwe", "line", "language", "fix", "where")
    return tuple({n: getattr(f, n) for n in names if getattr(f, n) is not None} for f in report.findings)


def _by_choice(batch: list[Delta]) -> dict[int, list[Delta]]:
    if not any([delta.index for delta in batch]):  # noqa: C419 - a list here costs half of what a generator does
        return {0: batch}
    parts: dict[int, list[Delta]] = {}
    for delta in batch:
        parts.setdefault(delta.index, []).append(delta)
    return parts


async def released(
    deltas: AsyncIterator[list[Delta]],
    request: ModelRequest,
    mode: ScanMode,
    outcome: Outcome,
    *,
    scan_code: CodeScanner,
    repair: Repair | None,
) -> AsyncGenerator[list[Delta], None]:
    """Yield what may leave now; see `Guard.release`."""
    choices: dict[int, Choice] = {}
    outcome.scan = UNFINISHED
    try:
        async for batch in deltas:
            out: list[Delta] = []
            for index, part in _by_choice(batch).items():
                choice = choices.get(index)
                if choice is None:
                    choice = choices[index] = Choice(index, request, mode)
                if choice.finished and any(d.text or d.reasoning or d.tool_calls or d.logprobs for d in part):
                    # Its verdict is in, so nobody would look at this any more.
                    raise EngineError("The engine went on with an answer after it had ended it. Please try again.")
                choice.push(part)
                if not choice.finished and any(delta.finish_reason is not None for delta in part):
                    await choice.finish(scan_code, repair)
            for choice in choices.values():
                if not choice.finished:
                    await choice.settle(scan_code, repair)
                out += choice.take()
            if all(choice.finished for choice in choices.values()):
                outcome.scan = scan.merged(choice.report for choice in choices.values() if choice.report)
            if out:
                yield out
        rest: list[Delta] = []
        for choice in choices.values():
            if not choice.finished:
                await choice.finish(scan_code, repair)
            rest += choice.take()
        outcome.scan = scan.merged(choice.report for choice in choices.values() if choice.report)
        if rest:
            yield rest
    except TextBlockedError as err:
        outcome.scan = err.report
        raise
    finally:
        for choice in choices.values():
            choice.cancel()
