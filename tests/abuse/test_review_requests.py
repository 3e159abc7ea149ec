"""Requests made to break the server or to hold its event loop."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.api.body import MAX_VALUES, parse_json_object
from server.api.public import MODEL_ROUTES
from server.api.schemas import check_schema
from server.errors import RequestError
from server.registry.served import INLINE_CHARS, text_chars
from server.types import Chat, ModelRequest, WireFormat

FORMATS = dict(MODEL_ROUTES)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def tool(name="f", **parameters):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def chat_of(*tools, messages=({"role": "user", "content": "x"},)):
    return ModelRequest(WireFormat.CHAT, "m", Chat(messages, tools), {})


@pytest.mark.parametrize("key", ["²", "٣", "1" * 5000, "-1", ""])
def test_a_token_id_is_a_plain_number(key):
    with pytest.raises(RequestError):
        FORMATS["/v1/chat/completions"].parse({**CHAT, "logit_bias": {key: 1}})


@pytest.mark.parametrize("number", [b"18446744073709551616", b"-9223372036854775809", b"9" * 4000, b"9" * 9000])
def test_a_whole_number_that_nothing_behind_can_encode_is_a_400(number):
    with pytest.raises(RequestError):
        parse_json_object(b'{"a":' + number + b"}")


def test_the_largest_whole_numbers_pass():
    body = b'{"a":[18446744073709551615,-9223372036854775808,0,-0]}'
    assert parse_json_object(body) == {"a": [2**64 - 1, -(2**63), 0, 0]}


@pytest.mark.parametrize("piece", [b"[]", b"{}", b"1", b"1.0", b'""'])
def test_a_body_of_a_million_values_is_refused_before_it_is_parsed(monkeypatch, piece):
    monkeypatch.setattr("server.api.body._DECODER", None)  # which the body must not reach
    body = b'{"a":[' + b",".join([piece] * (8 * 2**20 // (len(piece) + 1) - 8)) + b"]}"
    with pytest.raises(RequestError, match="values"):
        parse_json_object(body)


@pytest.mark.parametrize("text", [b"[,{" * (MAX_VALUES + 1), b'\\"[,' * (MAX_VALUES + 1)])
def test_brackets_in_a_text_are_no_values(text):
    assert len(parse_json_object(b'{"a":"' + text + b'"}')["a"]) >= 3 * MAX_VALUES


def test_an_unended_string_of_escapes_is_refused_in_linear_time():
    start_s = time.process_time()
    with pytest.raises(RequestError):
        parse_json_object(b"[" * (MAX_VALUES + 1) + b'"' + b'\\"' * 2_000_000)
    assert time.process_time() - start_s < 30  # milliseconds; the square of it would take hours


@pytest.mark.parametrize(
    "request_of_size",
    [
        chat_of(tool(properties={"a": {"description": "x" * INLINE_CHARS}})),
        chat_of(tool(**{"x" * INLINE_CHARS: {}})),
        chat_of(messages=({"role": "assistant", "content": None, "reasoning_content": "x" * INLINE_CHARS},)),
        chat_of(
            messages=(
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": "x" * INLINE_CHARS}}],
                },
            )
        ),
    ],
)
def test_text_outside_the_messages_is_not_tokenized_on_the_event_loop(request_of_size):
    assert text_chars(request_of_size) > INLINE_CHARS


@pytest.mark.parametrize(
    "schema",
    [
        {"patternProperties": {"(a+)+$": {}}},
        {"patternProperties": {"(": {}}},
        {"type": "string", "pattern": "a{60000}"},
        {"type": "string", "pattern": "a{1,60000}"},
        {"type": "string", "pattern": "a{0060000,}"},
    ],
)
def test_every_pattern_of_a_schema_is_bounded(schema):
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(RequestError):
        FORMATS["/v1/chat/completions"].parse({**CHAT, "response_format": wanted})


def named(num, schema):
    return {"type": "object", "properties": {f"p{n}": schema for n in range(num)}}


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "ab" * 100_000},
        {"const": {"a": "ab" * 100_000}},
        {"enum": ["ab" * 100_000]},
        {"enum": [f"{n:032x}" for n in range(4_000)]},
        {"type": "object", "properties": {"ab" * 100_000: {"type": "string"}}},
        named(1_000, True),
        named(1_000, {}),
        named(1_000, {"description": "anything"}),
        named(1_000, {"type": ["string", "number", "object", "array", "null"]}),
        {"anyOf": [True] * 1_000},
        {"items": {"anyOf": [named(100, True), named(100, True)]}},
        {"default": named(1_000, True)},  # a reference may lead there
    ],
)
def test_what_takes_a_grammar_compiler_minutes_is_refused(schema):
    """T2: the engine compiles it for one caller while the others wait; the worst of them took minutes."""
    with pytest.raises(RequestError) as caught:
        check_schema(schema, "schema")
    assert caught.value.param == "schema"


@pytest.mark.parametrize(
    "schema",
    [
        named(400, {"type": ["string", "null"], "description": "x" * 2_000, "default": "y" * 2_000}),
        {"enum": [f"value-{n}" for n in range(1_000)]},
        {**named(100, {}), "additionalProperties": False},
        named(1, {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 7}], "examples": ["z" * 5_000]}),
        {"type": "object", "properties": {"const": {"type": "string", "description": "x" * 5_000}}},
    ],
)
def test_schemas_of_real_tools_pass(schema):
    check_schema(schema, "schema")


@pytest.mark.parametrize("num", [2, 8])
def test_many_tools_are_bounded_together(num):
    schema = {"enum": [f"{n:030x}" for n in range(800)]}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": schema}} for n in range(num)]
    body = {**CHAT, "tools": tools, "tool_choice": "required"}
    if num == 2:
        FORMATS["/v1/chat/completions"].parse(body)
        return
    with pytest.raises(RequestError) as caught:
        FORMATS["/v1/chat/completions"].parse(body)
    assert caught.value.param == "tools"


def test_ordinary_patterns_pass():
    schema = {"patternProperties": {"^[a-z]{1,64}$": {"type": "string", "pattern": "^\\d{4}-\\d{2}$"}}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    payload = FORMATS["/v1/chat/completions"].parse({**CHAT, "response_format": wanted}).payload
    assert isinstance(payload, Chat)
    assert payload.response_format


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_name_ends_where_it_ends(route):
    """A line break in a tool's name would stand in the prompt outside any text of the caller's."""
    schema = {"type": "object"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"tools": [{"type": "function", "function": {"name": "f\n", "parameters": schema}}]},
        "/v1/messages": {"max_tokens": 8, "tools": [{"name": "f\n", "input_schema": schema}]},
        "/v1/responses": {"input": "hi", "tools": [{"type": "function", "name": "f\n", "parameters": schema}]},
    }
    with pytest.raises(RequestError) as caught:
        FORMATS[route].parse({**CHAT, **bodies[route]})
    assert "name" in (caught.value.param or "")
