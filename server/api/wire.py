"""What a wire format is: a parser to the pipeline's request and a writer of its answer, one file each."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, ModelRequest, Outcome, WireFormat


class Reply(Protocol):
    """One answer being written. `events`, `end` and `error` make a stream; `whole` makes a plain body."""

    def begin(self, prompt_tokens: int) -> bytes:
        """Return what a stream opens with, before any text; `prompt_tokens` is the size of the prompt."""
        ...

    def events(self, deltas: list[Delta]) -> bytes:
        """Return the events of these deltas."""
        ...

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return the events that end a stream; called once, after the outcome is durable."""
        ...

    def heartbeat(self) -> bytes:
        """Return what keeps a silent connection alive, or nothing where the format has nothing safe."""
        ...

    def error(self, problem: Problem) -> bytes:
        """Return the event that says why a stream broke."""
        ...

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        ...


class Format(Protocol):
    """One wire format."""

    wire_format: WireFormat
    action: str

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request; unknown fields are dropped.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        ...

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> Reply:
        """Return a writer for the answer to `request`."""
        ...

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return an error body in this format's dialect."""
        ...


@dataclass(slots=True)
class Choice:
    """One choice put together from its deltas."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str = "stop"


def assemble(deltas: list[Delta]) -> dict[int, Choice]:
    """Return the choices that `deltas` spell, by index, in order; at least choice 0."""
    choices: dict[int, Choice] = {0: Choice()}
    for delta in deltas:
        if delta.usage is not None and not delta.text and delta.finish_reason is None:
            continue
        choice = choices.setdefault(delta.index, Choice())
        if delta.text:
            choice.text.append(delta.text)
        if delta.reasoning:
            choice.reasoning.append(delta.reasoning)
        if delta.logprobs:
            choice.logprobs.append(delta.logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
        for piece in delta.tool_calls or ():
            merge_tool_call(choice.tool_calls, piece)
    return dict(sorted(choices.items()))


class ToolCalls:
    """Makes the streamed pieces of tool calls what concatenating clients need, whatever the engine repeats.

    A call's id, type and name stand in its first piece and nowhere else; an id that the engine leaves out is drawn.
    """

    def __init__(self) -> None:
        self._known: set[tuple[int, int]] = set()

    def pieces(self, choice: int, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the pieces of one delta of a choice."""
        pieces: list[dict[str, Any]] = []
        for piece in given:
            index, function = piece.get("index", 0), piece.get("function") or {}
            arguments = function.get("arguments") or ""
            if (choice, index) in self._known:
                pieces.append({"index": index, "function": {"arguments": arguments}})
                continue
            self._known.add((choice, index))
            first = {"name": function.get("name") or "", "arguments": arguments}
            pieces.append(
                {"index": index, "id": piece.get("id") or new_call_id(), "type": "function", "function": first}
            )
        return pieces


def new_call_id() -> str:
    """Draw the id of a tool call; it must differ from those of earlier turns, so no number will do."""
    return "call_" + secrets.token_hex(12)


def merge_tool_call(calls: dict[int, dict[str, Any]], piece: dict[str, Any]) -> None:
    """Add one streamed piece of a tool call to the calls so far, by its index."""
    index = piece.get("index", 0)
    function = piece.get("function") or {}
    call = calls.setdefault(
        index, {"id": piece.get("id") or new_call_id(), "type": "function", "function": {"name": "", "arguments": ""}}
    )
    if function.get("name") and not call["function"]["name"]:
        call["function"]["name"] = function["name"]
    call["function"]["arguments"] += function.get("arguments") or ""


def findings_of(outcome: Outcome) -> list[dict[str, Any]]:
    """Return the findings of the answer as clients read them; offsets and texts stay out."""
    if outcome.scan is None:
        return []
    return [
        {
            name: value
            for name, value in (
                ("rule", finding.rule),
                ("category", finding.category),
                ("severity", finding.severity),
                ("cwe", finding.cwe),
                ("line", finding.line),
                ("language", finding.language),
                ("message", finding.message),
                ("fix", finding.fix),
            )
            if value is not None
        }
        for finding in outcome.scan.findings
    ]
