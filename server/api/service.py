"""Public routes that reach no engine: the scan of a text, the receipt of one's own request, token counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.api import fields
from server.api.chat import parse_messages, parse_tools
from server.api.messages import MessageFormat
from server.api.wire import findings_of
from server.types import Chat, Completion, ModelRequest, Outcome, WireFormat

if TYPE_CHECKING:
    from server.types import ScanReport

MAX_SCAN_CHARS = 1_000_000


def parse_scan(body: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Return text, language and path of a `/v1/scan` body.

    Raises:
        RequestError: A field is wrong, by name.
    """
    text = body.get("text")
    if not isinstance(text, str) or len(text) > MAX_SCAN_CHARS:
        raise fields.wrong("text", f"a string of at most {MAX_SCAN_CHARS} characters")
    names: list[str | None] = []
    for name in ("language", "path"):
        value = body.get(name)
        if value is not None and (not isinstance(value, str) or len(value) > 512):
            raise fields.wrong(name, "a string of at most 512 characters")
        names.append(value)
    return text, names[0], names[1]


def scan_answer(report: ScanReport) -> dict[str, Any]:
    """Return the answer of `/v1/scan`."""
    findings = findings_of(Outcome(scan=report))
    for finding, known in zip(findings, report.findings, strict=True):
        finding["start"], finding["end"] = known.start, known.end
    return {"object": "scan", "state": report.state, "reason": report.reason, "findings": findings}


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
