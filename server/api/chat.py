"""OpenAI chat completions: where this format keeps its messages, tools, usage and stream events."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson

from server.api import fields
from server.api.schemas import check_schema, check_tools
from server.api.wire import ToolCalls, assemble, findings_of
from server.errors import RequestError
from server.types import Chat, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, Outcome, Usage

log = logging.getLogger("strongroom.api")

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_TEXT_PARTS = 1024


class ChatFormat:
    """`POST /v1/chat/completions`."""

    wire_format = WireFormat.CHAT
    action = "model:chat:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        fields.refuse(body)
        sampling = fields.sampling(body)
        if fields.flag(body, "logprobs"):
            sampling["logprobs"] = True
            sampling["top_logprobs"] = fields.integer(body, "top_logprobs", low=0, high=fields.MAX_TOP_LOGPROBS) or 0
        tools = parse_tools(body.get("tools"))
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body),
            payload=Chat(
                messages=parse_messages(body.get("messages")),
                tools=tools,
                tool_choice=parse_tool_choice(body.get("tool_choice"), tools),
                parallel_tool_calls=fields.flag(body, "parallel_tool_calls", default=True) if tools else None,
                response_format=parse_response_format(body.get("response_format")),
            ),
            sampling=sampling,
            max_tokens=fields.max_tokens(body, "max_completion_tokens", "max_tokens"),
            stream=fields.flag(body, "stream"),
            include_usage=fields.stream_options(body),
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> ChatReply:
        """Return a writer for the answer."""
        return ChatReply(request, "chatcmpl-" + request_id.removeprefix("req_"), created_s)

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()


class ChatReply:
    """Writes `chat.completion` and `chat.completion.chunk`."""

    def __init__(self, request: ModelRequest, reply_id: str, created_s: int) -> None:
        self._request = request
        self._id = reply_id
        self._created_s = created_s
        head = {"id": reply_id, "object": "chat.completion.chunk", "created": created_s, "model": request.model}
        # Nearly every event differs in its text alone: the rest is encoded once.
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._text = self._head + b'{"index":0,"delta":{"content":'
        self._begun: set[int] = set()
        self._calls = ToolCalls()

    def begin(self, prompt_tokens: int) -> bytes:
        """Return the opening chunk, which carries the role."""
        self._begun.add(0)
        return self._event(0, {"role": "assistant", "content": ""})

    def events(self, deltas: list[Delta]) -> bytes:
        """Return one event a delta."""
        return b"".join(
            [
                self._text + orjson.dumps(delta.text) + b'},"logprobs":null,"finish_reason":null}]}\n\n'
                if delta.index == 0 and delta.tool_calls is None and not delta.reasoning and delta.logprobs is None
                else self._other(delta)
                for delta in deltas
                if delta.text or delta.tool_calls or delta.reasoning or delta.logprobs
            ]
        )

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return finish reasons, usage where asked, and `[DONE]`."""
        ends = [delta for delta in last if delta.finish_reason is not None]
        pieces = [self._other(delta) for delta in ends[:-1]]
        pieces += [with_scan(self._other(delta), outcome) for delta in ends[-1:]]
        if self._request.include_usage:
            pieces.append(self._head + b'],"usage":' + orjson.dumps(usage_of(outcome.usage)) + b"}\n\n")
        pieces.append(b"data: [DONE]\n\n")
        return b"".join(pieces)

    def heartbeat(self) -> bytes:
        """Return an empty delta: every client's parser takes it, which is not so of comments."""
        return self._event(0, {})

    def error(self, problem: Problem) -> bytes:
        """Return the error event; no `[DONE]` follows, for the answer is not done."""
        return b"data: " + problem.openai_bytes() + b"\n\n"

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        choices = []
        for index, choice in assemble(deltas).items():
            text = "".join(choice.text)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if choice.reasoning:
                message["reasoning_content"] = "".join(choice.reasoning)
            if choice.tool_calls:
                message["tool_calls"] = list(choice.tool_calls.values())
                message["content"] = text or None
            logprobs = None
            if choice.logprobs:
                logprobs = {"content": [item for part in choice.logprobs for item in part.get("content") or ()]}
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            )
        body: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created_s,
            "model": self._request.model,
            "choices": choices,
            "usage": usage_of(outcome.usage),
        }
        if outcome.scan is not None:
            body["strongroom"] = {"scan": outcome.scan.state, "findings": findings_of(outcome)}
        return orjson.dumps(body)

    def _other(self, delta: Delta) -> bytes:
        content: dict[str, Any] = {}
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            content["role"] = "assistant"
        if delta.text or not (delta.tool_calls or delta.reasoning or delta.finish_reason):
            content["content"] = delta.text
        if delta.reasoning:
            content["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            content["tool_calls"] = self._calls.pieces(delta.index, delta.tool_calls)
        return self._event(delta.index, content, delta.finish_reason, delta.logprobs)

    def _event(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head + orjson.dumps(choice) + b"]}\n\n"


def with_scan(event: bytes, outcome: Outcome) -> bytes:
    """Return the event with the scan's verdict as one more field, which clients that know it not skip."""
    if outcome.scan is None:
        return event
    scan = orjson.dumps({"scan": outcome.scan.state, "findings": findings_of(outcome)})
    return event[:-3] + b',"strongroom":' + scan + b"}\n\n"


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def parse_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the messages with known fields only.

    Raises:
        RequestError: One is malformed, by its index.
    """
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", "a non-empty list of messages")
    if len(value) > fields.MAX_MESSAGES:
        raise fields.wrong("messages", f"at most {fields.MAX_MESSAGES} messages")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise fields.wrong(where, "an object")
    role = item.get("role")
    if role not in _ROLES:
        raise fields.wrong(f"{where}.role", "one of system, developer, user, assistant, tool")
    message: dict[str, Any] = {"role": "tool" if role == "function" else role}
    message["content"] = _content(item.get("content"), f"{where}.content", required=role not in ("assistant",))
    if item.get("name") is not None:
        if not isinstance(item["name"], str) or not fields.NAME.fullmatch(item["name"]):
            raise fields.wrong(f"{where}.name", "letters, digits, '_', '-', '.', at most 128 of them")
        message["name"] = item["name"]
    if role == "assistant":
        reasoning = item.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning:
            message["reasoning_content"] = reasoning
        calls = item.get("tool_calls")
        if calls:
            message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    if role in ("tool", "function") and item.get("tool_call_id") is not None:
        message["tool_call_id"] = _short(item["tool_call_id"], f"{where}.tool_call_id")
    return message


def _content(value: Any, where: str, *, required: bool) -> str | None:
    """Return content as one string; text parts are joined, for every chat template takes a string."""
    if value is None:
        if required:
            raise fields.wrong(where, "a string or a list of text parts")
        return None
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_TEXT_PARTS:
        raise fields.wrong(where, f"a string or a list of at most {MAX_TEXT_PARTS} text parts")
    texts = []
    for i, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        else:
            raise RequestError(
                f"'{where}[{i}]' must be a text part; images, audio and files are not accepted by this model.",
                param=f"{where}[{i}]",
                code="unsupported_content",
            )
    return "\n".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > fields.MAX_TOOLS:
        raise fields.wrong(where, f"a list of at most {fields.MAX_TOOLS} tool calls")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.wrong(f"{where}[{i}]", "a function call with a name")
        if not fields.NAME.fullmatch(function["name"]):
            raise fields.wrong(f"{where}[{i}].function.name", "letters, digits, '_', '-', '.', at most 128 of them")
        arguments = function.get("arguments") or "{}"
        if not isinstance(arguments, str):
            raise fields.wrong(f"{where}[{i}].function.arguments", "a string of JSON")
        calls.append(
            {
                "id": _short(call.get("id") or f"call_{i}", f"{where}[{i}].id"),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return calls


def _short(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or len(value) > 256:
        raise fields.wrong(where, "a string of at most 256 characters")
    return value


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the function tools; tools of other types are dropped with a log line, for agents send many.

    Raises:
        RequestError: A function tool is malformed, by its index.
    """
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
        tools.append(parse_function(tool.get("function"), f"tools[{i}].function"))
    found = tuple(tools)
    check_tools(found)
    return found


def parse_function(function: Any, where: str) -> dict[str, Any]:
    """Return one function tool with known fields only.

    Raises:
        RequestError: It is malformed.
    """
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise fields.wrong(where, "an object with a name")
    if not fields.NAME.fullmatch(function["name"]):
        raise fields.wrong(f"{where}.name", "letters, digits, '_', '-', '.', at most 128 of them")
    kept: dict[str, Any] = {"name": function["name"]}
    if function.get("description") is not None:
        if not isinstance(function["description"], str):
            raise fields.wrong(f"{where}.description", "a string")
        kept["description"] = function["description"]
    if function.get("parameters") is not None:
        check_schema(function["parameters"], f"{where}.parameters")
        kept["parameters"] = function["parameters"]
    else:
        kept["parameters"] = {"type": "object", "properties": {}}
    if function.get("strict") is True:
        kept["strict"] = True
    return {"type": "function", "function": kept}


def parse_tool_choice(value: Any, tools: tuple[dict[str, Any], ...]) -> str | dict[str, Any] | None:
    """Return `tool_choice`: none, auto, required, or a named function that is among the tools.

    Raises:
        RequestError: It names something else.
    """
    if value is None or not tools:
        if value in ("required",) or isinstance(value, dict):
            raise fields.wrong("tool_choice", "left out when there are no function tools")
        return None
    if value in ("none", "auto", "required"):
        return str(value)
    name = None
    if isinstance(value, dict):
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else value.get("name")
    names = {tool["function"]["name"] for tool in tools}
    if not isinstance(name, str) or name not in names:
        raise fields.wrong("tool_choice", "none, auto, required, or a function among the tools")
    return {"type": "function", "function": {"name": name}}


def parse_response_format(value: Any) -> dict[str, Any] | None:
    """Return `response_format`, its schema bounded.

    Raises:
        RequestError: It is malformed.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise fields.wrong("response_format.type", "text, json_object or json_schema")
    schema = value.get("json_schema")
    if not isinstance(schema, dict):
        raise fields.wrong("response_format.json_schema", "an object with a schema")
    check_schema(schema.get("schema"), "response_format.json_schema.schema")
    name = schema.get("name", "response")
    if not isinstance(name, str) or not fields.NAME.fullmatch(name):
        raise fields.wrong("response_format.json_schema.name", "letters, digits, '_' and '-'")
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": schema["schema"], "strict": bool(schema.get("strict"))},
    }
