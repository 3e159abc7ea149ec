"""The verdict on one whole text: pure and synchronous; the command, the route and the stream all end here."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

from server.guard import characters, code, fences, languages, secrets
from server.types import Finding, ScanReport, ScanState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SEVERITIES = ("low", "medium", "high", "critical")
MAX_SCAN_CHARS = 8 * 1024 * 1024
CodeScan = tuple[tuple[Finding, ...], str | None]  # findings, or why there is no verdict
CodeBlock = tuple[int, str, str | None]  # offset in the text, source, language
_CLEAN = ScanReport(ScanState.CLEAN)


def scan_text(text: str, *, language: str | None = None, path: str | None = None) -> ScanReport:
    """Return the verdict on `text`.

    Args:
        text: Prose with code in fences, or code alone where `language` or `path` says so.
        language: A language's name as a fence would carry it.
        path: The file's name; its suffix decides where `language` is None.
    """
    return judge(text, language=language, path=path, scan_code=scan_code)


def scan_code(source: str, language: str | None) -> CodeScan:
    """Return what the code detectors say of one block; `language` None means that the block says it itself."""
    try:
        if language in languages.UNSUPPORTED:  # the label may lie: what it reads like is looked at all the same
            return tuple(code.find_insecure(source, None)), f"there are no rules for {language}"
        return tuple(code.find_insecure(source, language)), None
    except Exception as err:  # noqa: BLE001  # the scanners' boundary: whatever fails in one is told as unscanned, by name only
        return (), f"the scanner failed: {type(err).__name__}"


def judge(
    text: str,
    *,
    language: str | None = None,
    path: str | None = None,
    scan_code: Callable[[str, str | None], CodeScan],
    blocks: Iterable[CodeBlock] | None = None,
) -> ScanReport:
    """Put the verdict on `text` together; `scan_code` judges each block, here or from what a worker has said.

    `blocks` are what `code_blocks` gives, where the caller has them already.
    """
    if len(text) > MAX_SCAN_CHARS:
        return ScanReport(ScanState.UNSCANNED, reason=f"the text is longer than {MAX_SCAN_CHARS} characters")
    findings: list[Finding] = []
    reasons: list[str] = []
    try:
        findings += find_anywhere(text)
    except secrets.TooManyCandidatesError:
        reasons.append(f"a line names credentials more than {secrets.MAX_CANDIDATES} times")
    if blocks is None:
        blocks = code_blocks(text, language=language, path=path)
    for start, source, label in blocks:
        found, reason = scan_code(source, label)
        if reason is not None:
            reasons.append(reason)
        findings.extend(shifted(found, start))
    return report_of(text, findings, reasons)


def find_anywhere(text: str) -> list[Finding]:
    """Return what needs no parser: credentials and characters."""
    return [*secrets.find_secrets(text), *characters.find_characters(text)]


def code_blocks(text: str, *, language: str | None = None, path: str | None = None) -> list[CodeBlock]:
    """Return each block of code in `text`."""
    whole = languages.by_label(language) or languages.by_path(path)
    if whole is not None:
        return [(0, text, whole)]
    if path is not None and not languages.is_prose_path(path):
        return []
    return blocks_of(text, fences.segments_of(text))


def blocks_of(text: str, segments: Iterable[fences.Segment]) -> list[CodeBlock]:
    """Return the blocks that `segments` bound in `text`."""
    return [(s.body_start, text[s.body_start : s.body_end], languages.by_label(s.label)) for s in segments]


def shifted(findings: Iterable[Finding], offset: int) -> list[Finding]:
    """Return `findings` of a block as findings of the text it stands in."""
    return [replace(f, start=f.start + offset, end=f.end + offset) for f in findings]


def report_of(text: str, findings: Iterable[Finding], reasons: Iterable[str] = ()) -> ScanReport:
    """Return the report: sorted, each thing once, with line numbers; a missing part makes the whole `unscanned`."""
    findings, reasons = list(findings), list(reasons)
    if not findings and not reasons:
        return _CLEAN
    starts = _line_starts(text)
    unique: dict[tuple[int, int, str], Finding] = {}
    for finding in sorted(findings, key=lambda f: (f.start, f.end, f.rule)):
        key = (finding.start, finding.end, finding.rule)
        if key not in unique:
            unique[key] = replace(finding, line=bisect_right(starts, finding.start))
    why = "; ".join(dict.fromkeys(reasons)) or None
    state = ScanState.UNSCANNED if why else ScanState.FINDINGS if unique else ScanState.CLEAN
    return ScanReport(state, tuple(unique.values()), why)


def merged(reports: Iterable[ScanReport]) -> ScanReport:
    """Return one report over several texts; `unscanned` outweighs the rest."""
    parts = list(reports)
    if len(parts) == 1:
        return parts[0]
    findings = tuple(finding for part in parts for finding in part.findings)
    why = "; ".join(dict.fromkeys(part.reason for part in parts if part.reason)) or None
    if any(part.state is ScanState.UNSCANNED for part in parts):
        return ScanReport(ScanState.UNSCANNED, findings, why)
    return ScanReport(ScanState.FINDINGS if findings else ScanState.CLEAN, findings, why)


def _line_starts(text: str) -> list[int]:
    starts = [0]
    position = text.find("\n")
    while position >= 0:
        starts.append(position + 1)
        position = text.find("\n", position + 1)
    return starts
