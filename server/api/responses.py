"""OpenAI responses: where this format keeps its input items, tools, usage and stream events.

`store` and `previous_response_id` are read here; keeping and finding answers is the business of `stored.py`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson

from server.api import fields
from server.api.chat import parse_function, parse_response_format, parse_tool_choice
from server.api.schemas import check_tools
from server.api.wire import assemble, findings_of, merge_tool_call
from server.errors import RequestError
from server.types import Chat, Continuation, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, Outcome

log = logging.getLogger("strongroom.api")

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "refusal")
_ROLES = ("user", "assistant", "system", "developer")


class ResponseFormat:
    """`POST /v1/responses`."""

    wire_format = WireFormat.RESPONSE
    action = "model:response:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        fields.refuse(body)
        for name in ("conversation", "prompt"):
            if body.get(name) is not None:
                raise RequestError(
                    f"'{name}' is not accepted: this server keeps responses, and nothing else; send the whole input.",
                    param=name,
                    code="unsupported_parameter",
                )
        if fields.flag(body, "background"):
            raise RequestError(
                "'background' is not accepted: answers are given at once.",
                param="background",
                code="unsupported_parameter",
            )
        tools = _parse_tools(body.get("tools"))
        text = body.get("text")
        instructions = _instructions(body.get("instructions"))
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body),
            payload=Chat(
                messages=(*instructions, *parse_items(body.get("input"))),
                tools=tools,
                tool_choice=parse_tool_choice(body.get("tool_choice") if tools else None, tools),
                parallel_tool_calls=fields.flag(body, "parallel_tool_calls", default=True) if tools else None,
                response_format=_parse_format(text.get("format")) if isinstance(text, dict) else None,
            ),
            sampling=fields.sampling({name: body.get(name) for name in ("temperature", "top_p", "seed", "logit_bias")}),
            max_tokens=fields.max_tokens(body, "max_output_tokens"),
            stream=fields.flag(body, "stream"),
            continuation=Continuation(
                _previous(body.get("previous_response_id")), fields.flag(body, "store"), len(instructions)
            ),
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> ResponseReply:
        """Return a writer for the answer."""
        return ResponseReply(request, request_id.removeprefix("req_"), created_s)

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()


class ResponseReply:
    """Writes a `response`, plain or as numbered events; items are streamed one after the other.

    Attributes:
        stored: Whether the response says of itself that it is stored; set before the first event.
        final: The whole response, once the answer has ended.
    """

    def __init__(self, request: ModelRequest, suffix: str, created_s: int) -> None:
        assert isinstance(request.payload, Chat)  # noqa: S101 - `parse` makes nothing else
        self._request = request
        self._chat = request.payload
        self._suffix = suffix
        self._created_s = created_s
        self.stored = False
        self.final: dict[str, Any] = {}
        self._sequence = 0
        self._items: list[dict[str, Any]] = []
        self._text: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._open: tuple[str, int] | None = None
        self._where = b""  # the message that is open, as its events name it

    def begin(self, prompt_tokens: int) -> bytes:
        """Return `response.created` and `response.in_progress`."""
        response = self._response("in_progress", [], None)
        return self._event("response.created", {"response": response}) + self._event(
            "response.in_progress", {"response": response}
        )

    def events(self, deltas: list[Delta]) -> bytes:
        """Return the events of these deltas."""
        pieces: list[bytes] = []
        for delta in deltas:
            if delta.index != 0:
                continue
            if delta.text:
                if self._open != ("message", 0):
                    pieces.append(self._to_message())
                self._text.append(delta.text)
                # Nearly every event is one of these, and differs from the last in its number and its text alone.
                pieces.append(
                    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
                    b'"sequence_number":%d,%b"delta":%b,"logprobs":[]}\n\n'
                    % (self._sequence, self._where, orjson.dumps(delta.text))
                )
                self._sequence += 1
            pieces += [self._call_piece(piece) for piece in delta.tool_calls or ()]
        return b"".join(pieces)

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return the events that close the response; the last one is what clients wait for."""
        pieces = [self.events(last)]
        if not self._items:
            pieces.append(self._to_message())
        pieces.append(self._close())
        status, name = _status(outcome)
        self.final = self._response(status, self._items, outcome)
        pieces.append(self._event(name, {"response": self.final}))
        return b"".join(pieces)

    def heartbeat(self) -> bytes:
        """Return nothing: clients of this format take nothing but its own events."""
        return b""

    def error(self, problem: Problem) -> bytes:
        """Return `response.failed`."""
        response = self._response("failed", self._items, None)
        response["error"] = {"code": problem.code, "message": problem.message}
        return self._event("response.failed", {"response": response})

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        choice = assemble(deltas)[0]
        items: list[dict[str, Any]] = []
        text = "".join(choice.text)
        if text or not choice.tool_calls:
            items.append(self._message(0, text))
        items += [_call_item(f"fc_{self._suffix}_{i}", call) for i, call in enumerate(choice.tool_calls.values())]
        status, _ = _status(outcome)
        self.final = self._response(status, items, outcome)
        return orjson.dumps(self.final)

    def _response(self, status: str, items: list[dict[str, Any]], outcome: Outcome | None) -> dict[str, Any]:
        continuation = self._request.continuation
        response: dict[str, Any] = {
            "id": f"resp_{self._suffix}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": self._request.max_tokens,
            "model": self._request.model,
            "output": items,
            "parallel_tool_calls": self._chat.parallel_tool_calls is not False,
            "previous_response_id": continuation.previous if continuation is not None else None,
            "reasoning": {"effort": None, "summary": None},
            "store": self.stored,
            "temperature": self._request.sampling.get("temperature"),
            "text": {"format": _format_as_asked(self._chat.response_format)},
            "tool_choice": _choice_as_asked(self._chat.tool_choice),
            "tools": [],
            "top_p": self._request.sampling.get("top_p"),
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": {},
        }
        if outcome is not None:
            usage = outcome.usage
            response["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
            if status == "incomplete":
                response["incomplete_details"] = {"reason": "max_output_tokens"}
            if outcome.scan is not None:
                response["strongroom"] = {"scan": outcome.scan.state, "findings": findings_of(outcome)}
        return response

    def _message(self, index: int, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {
            "id": f"msg_{self._suffix}_{index}",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [part],
        }

    def _to_message(self) -> bytes:
        if self._open == ("message", 0):
            return b""
        closed = self._close()
        index = len(self._items)
        item = {**self._message(index, ""), "status": "in_progress", "content": []}
        self._items.append(item)
        self._open = ("message", 0)
        where = {"item_id": item["id"], "output_index": index, "content_index": 0}
        self._where = orjson.dumps(where)[1:-1] + b","
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return (
            closed
            + self._event("response.output_item.added", {"output_index": index, "item": item})
            + self._event(
                "response.content_part.added",
                {"item_id": item["id"], "output_index": index, "content_index": 0, "part": part},
            )
        )

    def _call_piece(self, piece: dict[str, Any]) -> bytes:
        key = piece.get("index", 0)
        merge_tool_call(self._calls, piece)
        opened = b""
        if self._open != ("call", key):
            opened = self._close()
            index = len(self._items)
            item = {
                **_call_item(f"fc_{self._suffix}_{index}", self._calls[key]),
                "status": "in_progress",
                "arguments": "",
            }
            self._items.append(item)
            self._open = ("call", key)
            opened += self._event("response.output_item.added", {"output_index": index, "item": item})
        arguments = (piece.get("function") or {}).get("arguments")
        if not arguments:
            return opened
        return opened + self._event(
            "response.function_call_arguments.delta",
            {
                "item_id": self._items[-1]["id"],
                "output_index": len(self._items) - 1,
                "delta": arguments,
            },
        )

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        kind, key = self._open
        self._open = None
        index = len(self._items) - 1
        item_id = self._items[index]["id"]
        if kind == "call":
            item = _call_item(item_id, self._calls[key])
            self._items[index] = item
            return self._event(
                "response.function_call_arguments.done",
                {
                    "item_id": item_id,
                    "output_index": index,
                    "name": item["name"],
                    "arguments": item["arguments"],
                },
            ) + self._event("response.output_item.done", {"output_index": index, "item": item})
        item = self._message(index, "".join(self._text))
        self._text = []
        self._items[index] = item
        part = item["content"][0]
        where = {"item_id": item_id, "output_index": index, "content_index": 0}
        return (
            self._event("response.output_text.done", {**where, "text": part["text"], "logprobs": []})
            + self._event("response.content_part.done", {**where, "part": part})
            + self._event("response.output_item.done", {"output_index": index, "item": item})
        )

    def _event(self, name: str, data: dict[str, Any]) -> bytes:
        body = orjson.dumps({"type": name, "sequence_number": self._sequence, **data})
        self._sequence += 1
        return b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"


def _status(outcome: Outcome) -> tuple[str, str]:
    if outcome.finish_reasons.get(0) == "length":
        return "incomplete", "response.incomplete"
    return "completed", "response.completed"


def _choice_as_asked(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    if isinstance(choice, dict):
        return {"type": "function", "name": choice["function"]["name"]}
    return choice or "auto"


def _format_as_asked(given: dict[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {"type": "text"}
    return {"type": given["type"], **given.get("json_schema", {})}


def _call_item(item_id: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": item_id,
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
    }


def _instructions(value: Any) -> list[dict[str, Any]]:
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise fields.wrong("instructions", "a string")
    return [{"role": "system", "content": value}]


def _previous(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not fields.NAME.fullmatch(value):
        raise fields.wrong("previous_response_id", "the id of a response")
    return value


def parse_items(value: Any) -> list[dict[str, Any]]:
    """Return the messages that input or output items spell.

    Raises:
        RequestError: An item is malformed, by its place.
    """
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value or len(value) > fields.MAX_MESSAGES:
        raise fields.wrong("input", f"a string or a list of 1 to {fields.MAX_MESSAGES} items")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise fields.wrong(where, "an object")
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise fields.wrong(f"{where}.role", "user, assistant, system or developer")
            messages.append({"role": role, "content": _text(item.get("content"), f"{where}.content")})
        elif kind == "function_call":
            _add_call(messages, item, where)
        elif kind == "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": _call_id(item, where),
                    "content": _text(item.get("output"), f"{where}.output"),
                }
            )
        elif kind == "reasoning":
            continue  # the model's own earlier thoughts: not part of what it is told again
        else:
            log.info("dropped an input item of a type this server does not know", extra={"index": i})
    if not messages:
        raise fields.wrong("input", "a list with at least one message")
    return messages


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    name = item.get("name")
    if not isinstance(name, str) or not fields.NAME.fullmatch(name):
        raise fields.wrong(f"{where}.name", "letters, digits, '_', '-', '.', at most 128 of them")
    arguments = item.get("arguments", "{}")
    if not isinstance(arguments, str):
        raise fields.wrong(f"{where}.arguments", "a string of JSON")
    call = {"id": _call_id(item, where), "type": "function", "function": {"name": name, "arguments": arguments}}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _call_id(item: dict[str, Any], where: str) -> str:
    call_id = item.get("call_id")
    if not isinstance(call_id, str) or not call_id or len(call_id) > 256:
        raise fields.wrong(f"{where}.call_id", "a string of at most 256 characters")
    return call_id


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > fields.MAX_MESSAGES:
        raise fields.wrong(where, "a string or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise RequestError(
                f"'{where}[{i}]' must be a text part; images and files are not accepted by this model.",
                param=f"{where}[{i}]",
                code="unsupported_content",
            )
        texts.append(text)
    return "\n".join(texts)


def _parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > fields.MAX_TOOLS:
        raise fields.wrong("tools", f"a list of at most {fields.MAX_TOOLS} tools")
    tools = []
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise fields.wrong(f"tools[{i}]", "an object")
        if tool.get("type") != "function":
            log.info("dropped a tool of a type this server does not know", extra={"index": i})
            continue
        tools.append(parse_function(tool, f"tools[{i}]"))
    found = tuple(tools)
    check_tools(found)
    return found


def _parse_format(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict) and value.get("type") == "json_schema":
        inner = {name: value.get(name) for name in ("schema", "strict")}
        return parse_response_format(
            {"type": "json_schema", "json_schema": {**inner, "name": value.get("name") or "response"}}
        )
    return parse_response_format(value)
