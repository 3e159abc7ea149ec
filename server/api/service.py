"""Public routes that reach no engine: the scan of texts, the receipt of one's own request, token counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.api import fields
from server.api.chat import parse_messages, parse_tools
from server.api.messages import MessageFormat
from server.api.wire import findings_of
from server.guard.sarif import to_sarif
from server.guard.scan import merged
from server.types import Chat, Completion, ModelRequest, Outcome, WireFormat

if TYPE_CHECKING:
    from server.types import ScanReport

MAX_SCAN_CHARS = 1_000_000
MAX_SCAN_ITEMS = 256
MAX_BATCH_CHARS = 4_000_000
MAX_NAME_CHARS = 512
MAX_RECORDED_FINDINGS = 32
FORMATS = ("json", "sarif")


@dataclass(frozen=True, slots=True)
class ScanItem:
    """One text, and what the caller says of it."""

    text: str
    language: str | None
    path: str | None


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """What `/v1/scan` is asked: one text, or a batch that is answered item by item."""

    items: tuple[ScanItem, ...]
    is_batch: bool
    as_sarif: bool


def parse_scan(body: dict[str, Any]) -> ScanRequest:
    """Return what a `/v1/scan` body asks.

    Raises:
        RequestError: A field is wrong, by name; in a batch `items[3].text` names the item too.
    """
    shape = body.get("format")
    if shape is not None and (not isinstance(shape, str) or shape not in FORMATS):
        raise fields.wrong("format", f"one of {', '.join(FORMATS)}")
    as_sarif = shape == "sarif"
    given = body.get("items")
    if given is None:
        return ScanRequest((_parse_item(body, ""),), is_batch=False, as_sarif=as_sarif)
    if body.get("text") is not None:
        raise fields.wrong("items", "left out where text is sent: one text, or a batch of them")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_SCAN_ITEMS:
        raise fields.wrong("items", f"a list of 1 to {MAX_SCAN_ITEMS} objects")
    items = tuple(_parse_item(item, f"items[{number}]") for number, item in enumerate(given))
    if sum(len(item.text) for item in items) > MAX_BATCH_CHARS:
        raise fields.wrong("items", f"at most {MAX_BATCH_CHARS} characters of text together")
    return ScanRequest(items, is_batch=True, as_sarif=as_sarif)


def _parse_item(item: Any, where: str) -> ScanItem:
    if not isinstance(item, dict):
        raise fields.wrong(where, "an object with a text")
    prefix = f"{where}." if where else ""
    text = item.get("text")
    if not isinstance(text, str) or len(text) > MAX_SCAN_CHARS:
        raise fields.wrong(f"{prefix}text", f"a string of at most {MAX_SCAN_CHARS} characters")
    names: list[str | None] = []
    for name in ("language", "path"):
        value = item.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > MAX_NAME_CHARS):
            raise fields.wrong(prefix + name, f"a string of at most {MAX_NAME_CHARS} characters")
        names.append(value)
    return ScanItem(text, names[0], names[1])


def scan_answer(request: ScanRequest, reports: list[ScanReport]) -> dict[str, Any]:
    """Return the answer of `/v1/scan`; `reports` in the order of the items."""
    if request.as_sarif:
        named = zip(request.items, reports, strict=True)
        return to_sarif(
            (item.path or (f"items[{number}]" if request.is_batch else "text"), report)
            for number, (item, report) in enumerate(named)
        )
    if not request.is_batch:
        return {"object": "scan", **_verdict(reports[0])}
    return {
        "object": "scan.batch",
        "state": merged(reports).state,
        "items": [
            {"index": number, "path": item.path, **_verdict(report)}
            for number, (item, report) in enumerate(zip(request.items, reports, strict=True))
        ],
    }


def scan_record(request: ScanRequest, reports: list[ScanReport]) -> dict[str, Any]:
    """Return what the log says of a scan: sizes, verdicts and rules; no text, and no path, which may be one."""
    found = [(number, finding) for number, report in enumerate(reports) for finding in report.findings]
    whole = merged(reports)
    states = [str(report.state) for report in reports]
    return {
        "num_texts": len(reports),
        "num_chars": sum(len(item.text) for item in request.items),
        "state": str(whole.state),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "num_findings": len(found),
        "findings": [
            {"text": number, "rule": finding.rule, "severity": finding.severity, "cwe": finding.cwe}
            for number, finding in found[:MAX_RECORDED_FINDINGS]
        ],
    }


def _verdict(report: ScanReport) -> dict[str, Any]:
    findings = findings_of(Outcome(scan=report))
    for finding, known in zip(findings, report.findings, strict=True):
        finding["start"], finding["end"] = known.start, known.end
    return {"state": report.state, "reason": report.reason, "findings": findings}


def parse_tokenize(body: dict[str, Any]) -> ModelRequest:
    """Return what `/tokenize` is asked to count: `prompt`, or `messages` with their template.

    Raises:
        RequestError: A field is wrong or refused, by name.
    """
    fields.refuse({name: value for name, value in body.items() if name != "add_special_tokens"})
    model = fields.model_name(body)
    if body.get("messages") is not None:
        chat = Chat(parse_messages(body["messages"]), parse_tools(body.get("tools")))
        return ModelRequest(WireFormat.TOKENIZE, model, chat, {})
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise fields.wrong("prompt", "a string, or send messages")
    return ModelRequest(WireFormat.TOKENIZE, model, Completion(prompt), {})


def parse_count(body: dict[str, Any]) -> ModelRequest:
    """Return what `/v1/messages/count_tokens` is asked to count.

    Raises:
        RequestError: A field is wrong or refused, by name.
    """
    return MessageFormat().parse({**body, "max_tokens": 1, "stream": False})
