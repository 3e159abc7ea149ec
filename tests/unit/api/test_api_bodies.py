"""Whatever JSON stands in a field of a request, its parser takes it or refuses it by name; it never breaks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from server.api.public import MODEL_ROUTES
from server.api.service import parse_count, parse_scan, parse_tokenize
from server.errors import RequestError

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}, "strict": True}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
COMMON = {"model": "m", "stream": True, "temperature": 1, "top_p": 1, "seed": 1}
SAMPLING = {**COMMON, "stop": ["x"], "n": 1, "logit_bias": {"1": 1}, "stream_options": {"include_usage": True}}
CHAT = {
    **SAMPLING,
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "x"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": {"type": "object"}}},
    "parallel_tool_calls": True, "logprobs": True, "top_logprobs": 1, "max_tokens": 1,
}  # fmt: skip
MESSAGE = {
    **COMMON,
    "max_tokens": 1, "system": [{"type": "text", "text": "x"}], "stop_sequences": ["x"], "top_k": 1,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [], "is_error": True}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {**SAMPLING, "prompt": ["x"], "suffix": "y", "best_of": 1, "logprobs": 1, "max_tokens": 1},
    "/v1/responses": {
        **COMMON,
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
            {"type": "reasoning"},
        ],
        "instructions": "i", "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "r", "schema": {"type": "object"}}},
        "store": True, "previous_response_id": "resp_1", "max_output_tokens": 1, "background": False,
    },
    "/v1/messages": MESSAGE,
    "/v1/embeddings": {"model": "m", "input": ["x"], "encoding_format": "float", "dimensions": 1, "stream": False},
    "/v1/fim/completions": {**SAMPLING, "prompt": "x", "suffix": "y", "max_tokens": 1},
    "/infill": {
        **COMMON,
        "input_prefix": "x", "input_suffix": "y", "prompt": "z", "n_predict": -1,
        "input_extra": [{"text": "x", "filename": "f"}],
    },
}  # fmt: skip
PARSERS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    route: (fmt.parse, BODIES[route]) for route, fmt in MODEL_ROUTES
} | {
    "/v1/messages/count_tokens": (parse_count, MESSAGE),
    "/tokenize": (parse_tokenize, {"model": "m", "messages": CHAT["messages"], "tools": CHAT["tools"]}),
    "/v1/scan": (parse_scan, {"text": "x", "language": "python", "path": "a.py", "format": "json"}),
    "/v1/scan, a batch": (
        parse_scan,
        {"items": [{"text": "x", "language": "python", "path": "a.py"}, {"text": ""}], "format": "sarif"},
    ),
}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, 1.5, "", "x", "auto", "\x00", "²", [], {}, [[]], [{}], [None], ["x"], [1],
    {"type": []}, {"type": {}}, {"type": "tool", "name": []}, {"name": []}, {"text": 1}, {"function": {"name": []}},
    {"type": "json_schema", "json_schema": {"schema": {"type": [[]]}}}, {"type": "json_schema", "schema": {"$ref": 1}},
]  # fmt: skip


def paths_of(value, path=()):
    """Where each value of a JSON document stands."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from paths_of(item, (*path, key))


def put(body, path, value):
    changed = copy.deepcopy(body)
    target: Any = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


@pytest.mark.parametrize("route", PARSERS)
def test_the_whole_body_is_taken(route):
    parse, body = PARSERS[route]
    parse(body)


@pytest.mark.parametrize("route", PARSERS)
def test_an_odd_value_anywhere_is_taken_or_refused_by_name(route):
    parse, body = PARSERS[route]
    refused = 0
    for path in paths_of(body):
        for value in ODD:
            try:
                parse(put(body, path, copy.deepcopy(value)))
            except RequestError as err:
                refused += bool(str(err))
            except Exception as err:
                raise AssertionError(f"{path} = {value!r} broke the parser") from err
    assert refused > 20
