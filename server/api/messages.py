"""Anthropic messages: where this format keeps its system text, blocks, tools, usage and stream events."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson

from server.api import fields
from server.api.chat import parse_function
from server.api.schemas import check_tools
from server.api.wire import assemble, findings_of, new_call_id
from server.errors import RequestError
from server.types import Chat, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, Outcome

log = logging.getLogger("strongroom.api")

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
MAX_BLOCKS = 4096
BILLING_HEADER = "x-anthropic-billing-header:"
"""Claude Code's first system block; it changes with every call and would spoil the prefix cache."""


class MessageFormat:
    """`POST /v1/messages`."""

    wire_format = WireFormat.MESSAGE
    action = "model:message:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        return self._parse(body, fields.max_tokens(body, "max_tokens"))

    def _parse(self, body: dict[str, Any], max_tokens: int | None) -> ModelRequest:
        fields.refuse(body)
        common = {name: body.get(name) for name in ("temperature", "top_p", "top_k", "seed", "logit_bias")}
        sampling = fields.sampling({**common, "stop": body.get("stop_sequences")})
        tools = _parse_tools(body.get("tools"))
        choice, parallel = _parse_tool_choice(body.get("tool_choice"), tools)
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body),
            payload=Chat(
                messages=(*_parse_system(body.get("system")), *_parse_messages(body.get("messages"))),
                tools=tools,
                tool_choice=choice,
                parallel_tool_calls=parallel if tools else None,
            ),
            sampling=sampling,
            max_tokens=max_tokens,
            stream=fields.flag(body, "stream"),
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> MessageReply:
        """Return a writer for the answer."""
        return MessageReply(request, "msg_" + request_id.removeprefix("req_"))

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return orjson.dumps(problem.anthropic(request_id))


class MessageReply:
    """Writes a `message`, plain or as typed events. Block by block: one is open at a time."""

    def __init__(self, request: ModelRequest, reply_id: str) -> None:
        self._request = request
        self._id = reply_id
        self._block = -1
        self._open: tuple[str, int] | None = None
        self._called = False

    def begin(self, prompt_tokens: int) -> bytes:
        """Return `message_start`, with the size of the prompt, which some clients read nowhere else."""
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }
        return _event("message_start", {"type": "message_start", "message": message})

    def events(self, deltas: list[Delta]) -> bytes:
        """Return the events of these deltas, opening and closing blocks as their kind changes."""
        pieces: list[bytes] = []
        for delta in deltas:
            if delta.index != 0:
                continue
            if delta.reasoning:
                pieces.append(self._to_block("thinking", 0, {"type": "thinking", "thinking": "", "signature": ""}))
                pieces.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
            if delta.text:
                if self._open != ("text", 0):
                    pieces.append(self._to_block("text", 0, {"type": "text", "text": ""}))
                pieces.append(
                    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
                    b'"delta":{"type":"text_delta","text":%b}}\n\n' % (self._block, orjson.dumps(delta.text))
                )
            pieces.extend(self._tool(piece) for piece in delta.tool_calls or ())
        return b"".join(pieces)

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return the events that close the message."""
        pieces = [self.events(last)]
        if self._block < 0:
            pieces.append(self._to_block("text", 0, {"type": "text", "text": ""}))
        pieces.append(self._close())
        change: dict[str, Any] = {
            "type": "message_delta",
            "delta": self._stopped(outcome, called=self._called),
            "usage": _usage(outcome),
        }
        if outcome.scan is not None:
            change["strongroom"] = {"scan": outcome.scan.state, "findings": findings_of(outcome)}
        pieces.append(_event("message_delta", change))
        pieces.append(_event("message_stop", {"type": "message_stop"}))
        return b"".join(pieces)

    def heartbeat(self) -> bytes:
        """Return Anthropic's own ping."""
        return b'event: ping\ndata: {"type":"ping"}\n\n'

    def error(self, problem: Problem) -> bytes:
        """Return the error event."""
        return _event("error", problem.anthropic(self._id))

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        choice = assemble(deltas)[0]
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": "".join(choice.reasoning), "signature": ""})
        text = "".join(choice.text)
        if text or not choice.tool_calls:
            content.append({"type": "text", "text": text})
        content += [
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["function"]["name"],
                "input": _arguments(call["function"]["arguments"]),
            }
            for call in choice.tool_calls.values()
        ]
        body: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": content,
            **self._stopped(outcome, called=bool(choice.tool_calls)),
            "usage": _usage(outcome),
        }
        if outcome.scan is not None:
            body["strongroom"] = {"scan": outcome.scan.state, "findings": findings_of(outcome)}
        return orjson.dumps(body)

    def _stopped(self, outcome: Outcome, *, called: bool) -> dict[str, Any]:
        """Return why the answer ended. Of a forced tool the engine says `stop`, and callers wait for `tool_use`."""
        finished = outcome.finish_reasons.get(0, "stop")
        stop = outcome.stops.get(0)
        if finished == "stop" and stop in self._request.sampling.get("stop", ()):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        reason = "tool_calls" if called and finished == "stop" else finished
        return {"stop_reason": _STOP_REASONS.get(reason, "end_turn"), "stop_sequence": None}

    def _tool(self, piece: dict[str, Any]) -> bytes:
        self._called = True
        function = piece.get("function") or {}
        index = piece.get("index", 0)
        opened = b""
        if self._open != ("tool_use", index):
            block: dict[str, Any] = {
                "type": "tool_use",
                "id": piece.get("id") or new_call_id(),
                "name": function.get("name") or "",
                "input": {},
            }
            opened = self._to_block("tool_use", index, block)
        arguments = function.get("arguments")
        if not arguments:
            return opened
        return opened + self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _to_block(self, kind: str, key: int, block: dict[str, Any]) -> bytes:
        if self._open == (kind, key):
            return b""
        closed = self._close()
        self._block += 1
        self._open = (kind, key)
        return closed + _event(
            "content_block_start", {"type": "content_block_start", "index": self._block, "content_block": block}
        )

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", {"type": "content_block_stop", "index": self._block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"type": "content_block_delta", "index": self._block, "delta": delta})


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def _usage(outcome: Outcome) -> dict[str, int]:
    usage = outcome.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _arguments(text: str) -> Any:
    try:
        return orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {"_raw": text}  # the model's own mistake; the caller's schema check will say so


def _parse_system(value: Any) -> list[dict[str, Any]]:
    if value is None or value == "":
        return []
    texts = _texts(value, "system")
    kept = [text for text in texts if not text.startswith(BILLING_HEADER)]
    return [{"role": "system", "content": "\n".join(kept)}] if kept else []


def _texts(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or len(value) > MAX_BLOCKS:
        raise fields.wrong(where, "a string or a list of text blocks")
    texts = []
    for i, block in enumerate(value):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise _unsupported(f"{where}[{i}]")
        texts.append(block["text"])
    return texts


def _unsupported(where: str) -> RequestError:
    return RequestError(
        f"'{where}' must be a text block; images and documents are not accepted by this model.",
        param=where,
        code="unsupported_content",
    )


def _parse_messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or len(value) > fields.MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {fields.MAX_MESSAGES} messages")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        where = f"messages[{i}]"
        role = item.get("role") if isinstance(item, dict) else None
        if role not in ("user", "assistant", "system"):
            raise fields.wrong(f"{where}.role", "user, assistant or system")
        content = item.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif not isinstance(content, list) or len(content) > MAX_BLOCKS:
            raise fields.wrong(f"{where}.content", "a string or a list of blocks")
        elif role == "assistant":
            messages.append(_assistant(content, f"{where}.content"))
        else:
            messages += _turn(role, content, f"{where}.content")
    return messages


def _assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use" and isinstance(block.get("name"), str) and fields.NAME.fullmatch(block["name"]):
            call_id = block.get("id")
            if not isinstance(call_id, str) or not call_id or len(call_id) > 256:
                raise fields.wrong(f"{where}[{i}].id", "a string of at most 256 characters")
            arguments = orjson.dumps(block.get("input") or {}).decode()
            calls.append(
                {"id": call_id, "type": "function", "function": {"name": block["name"], "arguments": arguments}}
            )
        elif kind in ("thinking", "redacted_thinking", "server_tool_use", "web_search_tool_result"):
            continue  # the model's own earlier thoughts and other servers' tools: not part of what it is told again
        else:
            raise _unsupported(f"{where}[{i}]")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts else None}
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    return message


def _turn(role: str, blocks: list[Any], where: str) -> list[dict[str, Any]]:
    """Return a user turn; tool results stand in turns of their own before the text, as OpenAI's form has it."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_result" and role == "user":
            call_id = block.get("tool_use_id")
            if not isinstance(call_id, str) or not call_id or len(call_id) > 256:
                raise fields.wrong(f"{where}[{i}].tool_use_id", "a string of at most 256 characters")
            content = block.get("content")
            text = "\n".join(_texts(content, f"{where}[{i}].content")) if content is not None else ""
            if block.get("is_error") is True:
                text = "Error: " + text
            results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            raise _unsupported(f"{where}[{i}]")
    if texts or not results:
        results.append({"role": role, "content": "\n".join(texts)})
    return results


def _parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > fields.MAX_TOOLS:
        raise fields.wrong("tools", f"a list of at most {fields.MAX_TOOLS} tools")
    tools = []
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise fields.wrong(f"tools[{i}]", "an object")
        if "input_schema" not in tool:  # Claude Code sends its servers' own tools, such as web search
            log.info("dropped a tool of a type this server does not know", extra={"index": i})
            continue
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool["input_schema"],
            "strict": tool.get("strict"),
        }
        tools.append(parse_function(function, f"tools[{i}]"))
    found = tuple(tools)
    check_tools(found)
    return found


def _parse_tool_choice(value: Any, tools: tuple[dict[str, Any], ...]) -> tuple[str | dict[str, Any] | None, bool]:
    if value is None or not tools:
        return None, True
    kind = value.get("type") if isinstance(value, dict) else None
    parallel = not (isinstance(value, dict) and value.get("disable_parallel_tool_use") is True)
    if kind in ("auto", "none"):
        return str(kind), parallel
    if kind == "any":
        return "required", parallel
    names = {tool["function"]["name"] for tool in tools}
    name = value.get("name") if kind == "tool" else None
    if not isinstance(name, str) or name not in names:
        raise fields.wrong("tool_choice", "auto, any, none, or a tool among the tools")
    return {"type": "function", "function": {"name": name}}, parallel
