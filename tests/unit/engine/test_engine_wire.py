"""Bodies to the engine and its events, without a socket."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from server.engine.wire import MAX_LINE_BYTES, EventParser, build_request, parse_embeddings, raise_refusal
from server.errors import ContextLengthError, EngineError, EngineUnavailableError, RequestError
from server.types import (
    Chat,
    Completion,
    Delta,
    Embedding,
    ModelRequest,
    Payload,
    Prompt,
    TemplateRef,
    Usage,
    WireFormat,
)

PROMPT = Prompt("text", [5, 6, 7], TemplateRef("t", "1", "0" * 64))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def request(payload: Payload, **fields: Any) -> ModelRequest:
    return ModelRequest(WireFormat.CHAT, "m", payload, fields.pop("sampling", {}), **fields)


def built(payload: Payload, **fields: Any) -> tuple[str, dict[str, Any]]:
    path, body = build_request(PROMPT, request(payload, **fields), model="m", max_tokens=9, cache_salt="salt")
    return path, orjson.loads(body)


def test_chat_carries_ids_and_no_messages() -> None:
    path, body = built(Chat(({"role": "user", "content": "hello"},)), sampling={"temperature": 0.5}, stream=True)
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": "salt",
        "messages": [],
        "kv_transfer_params": {"prompt_token_ids": [5, 6, 7]},
        "max_completion_tokens": 9,
    }


def test_completion_carries_ids() -> None:
    path, body = built(Completion("text"), stream=True)
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"]) == ([5, 6, 7], 9)


def test_plain_caller_gets_fewer_chunks_but_for_tools() -> None:
    messages = ({"role": "user", "content": "x"},)
    assert built(Chat(messages))[1]["stream_interval"] > 1
    assert "stream_interval" not in built(Chat(messages, tools=(TOOL,)))[1]
    assert "stream_interval" not in built(Chat(messages), stream=True)[1]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_tools_are_strict(choice: str | dict[str, Any]) -> None:
    chat = Chat((), tools=(TOOL,), tool_choice=choice)
    body = built(chat)[1]
    assert body["tools"][0]["function"]["strict"] is True
    assert body["tool_choice"] == choice
    assert "strict" not in TOOL["function"]


def test_free_tools_are_left_as_they_are() -> None:
    body = built(Chat((), tools=(TOOL,), parallel_tool_calls=False))[1]
    assert body["tools"] == [TOOL]
    assert body["tool_choice"] == "auto"
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    "field", ["kv_transfer_params", "echo", "chat_template", "cache_salt", "priority", "prompt_embeds"]
)
def test_fields_beyond_the_list_are_refused(field: str) -> None:
    with pytest.raises(RequestError) as caught:
        built(Chat(()), sampling={field: 1})
    assert caught.value.param == field


def test_embeddings_carry_ids() -> None:
    assert built(Embedding(("one",)))[1]["input"] == [[5, 6, 7]]
    several = Prompt("", [], PROMPT.template, inputs=([1, 2], [3]))
    payload = Embedding(("one", "two"), dimensions=8)
    path, body = build_request(several, request(payload), model="m", max_tokens=0, cache_salt="s")
    assert path == "/v1/embeddings"
    assert orjson.loads(body) == {"model": "m", "input": [[1, 2], [3]], "encoding_format": "float", "dimensions": 8}


EVENTS = (
    b': keep-alive\n\ndata: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"h\xc3\xa9"}},{"index":1,"delta":{"reasoning":"r"}}]}\r\n\r\n'
    b'data:{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]},"finish_reason":"tool_calls"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":1}}}'
    b"\n\ndata: [DONE]\n\n"
)
DELTAS = [
    Delta(),
    Delta(text="hé"),
    Delta(index=1, reasoning="r"),
    Delta(tool_calls=[{"index": 0}], finish_reason="tool_calls"),
    Delta(usage=Usage(3, 2, 1)),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_events_cut_anywhere(size: int) -> None:
    parser = EventParser(chat=True)
    deltas = [d for at in range(0, len(EVENTS), size) for d in parser.feed(EVENTS[at : at + size])]
    assert deltas == DELTAS
    assert parser.done


def test_completion_events() -> None:
    parser = EventParser(chat=False)
    assert parser.feed(b'data: {"choices":[{"index":2,"text":"x","finish_reason":"stop"}]}\n\n') == [
        Delta(index=2, text="x", finish_reason="stop")
    ]
    assert not parser.done


@pytest.mark.parametrize(
    "line",
    [b"data: {", b"data: []", b'data: {"choices":[{}]}', b'data: {"choices":[{"index":0}]}', b'data: "x"', b"data: 7"],
)
def test_unreadable_events_fail(line: bytes) -> None:
    with pytest.raises(EngineError, match="could not be read"):
        EventParser(chat=True).feed(line + b"\n")


def test_endless_line_fails() -> None:
    parser = EventParser(chat=True)
    parser.feed(b"data: ")
    with pytest.raises(EngineError, match="beyond the limit"):
        parser.feed(b"x" * (MAX_LINE_BYTES + 1))


def test_error_event_is_translated_without_its_words() -> None:
    event = b'data: {"error":{"message":"CUDA error at 0x7fff /usr/lib/x","code":500}}\n\n'
    with pytest.raises(EngineError) as caught:
        EventParser(chat=True).feed(event)
    assert "0x" not in str(caught.value)
    assert "/usr" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message", "kind", "code"),
    [
        (400, "This model's maximum context length is 9 tokens", RequestError, ContextLengthError.code),
        (400, "grammar 'SECRET' is invalid", RequestError, "unsupported_parameter"),
        (422, "SECRET", RequestError, "unsupported_parameter"),
        (503, "SECRET", EngineUnavailableError, "engine_unavailable"),
        (500, "SECRET", EngineError, "engine_error"),
        (404, "SECRET", EngineError, "engine_error"),
        (302, "SECRET", EngineError, "engine_error"),
    ],
)
def test_refusals(status: int, message: str, kind: type[Exception], code: str) -> None:
    with pytest.raises(kind) as caught:
        raise_refusal({"error": {"message": message}}, status=status)
    assert caught.value.code == code  # type: ignore[attr-defined]
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("body", [None, "x", [], {}, {"error": "x"}, {"error": {"code": "x"}}])
def test_refusals_of_any_shape(body: Any) -> None:
    with pytest.raises(EngineError):
        raise_refusal(body, status=500)


def test_embeddings_answer() -> None:
    body = b'{"data":[{"index":0,"embedding":[0.5]},{"index":1,"embedding":[1.0]}],"usage":{"prompt_tokens":4}}'
    assert parse_embeddings(body) == [
        Delta(embedding=[0.5], finish_reason="stop"),
        Delta(index=1, embedding=[1.0], finish_reason="stop"),
        Delta(usage=Usage(4)),
    ]
    with pytest.raises(EngineError):
        parse_embeddings(b"{}")
