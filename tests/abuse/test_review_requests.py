"""Requests made to break the server or to hold its event loop."""

from __future__ import annotations

import time

import pytest

from server.api.body import MAX_VALUES, parse_json_object
from server.api.public import MODEL_ROUTES
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


def test_ordinary_patterns_pass():
    schema = {"patternProperties": {"^[a-z]{1,64}$": {"type": "string", "pattern": "^\\d{4}-\\d{2}$"}}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    payload = FORMATS["/v1/chat/completions"].parse({**CHAT, "response_format": wanted}).payload
    assert isinstance(payload, Chat)
    assert payload.response_format
