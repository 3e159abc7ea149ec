"""Every body and every event holds to the types of the official SDKs, strictly: the SDKs themselves forgive much."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from anthropic import types as anthropic
from openai import types as openai
from openai.types import chat, responses
from pydantic import TypeAdapter

from benchmarks.gateway.kit import EMBEDDER, MODEL

TURN = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
PLAIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (chat.ChatCompletion, {"messages": TURN}),
    "/v1/completions": (openai.Completion, {"prompt": "def f():"}),
    "/v1/responses": (responses.Response, {"input": "hi"}),
    "/v1/messages": (anthropic.Message, {"messages": TURN, "max_tokens": 9}),
    "/v1/messages/count_tokens": (anthropic.MessageTokensCount, {"messages": TURN}),
    "/v1/embeddings": (openai.CreateEmbeddingResponse, {"model": EMBEDDER, "input": "hi"}),
}
STREAMED: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (chat.ChatCompletionChunk, {"stream_options": {"include_usage": True}}),
    "/v1/responses": (responses.ResponseStreamEvent, {}),
    "/v1/messages": (anthropic.RawMessageStreamEvent, {}),
}
TOOLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}},
    "/v1/responses": {"type": "function", "name": "look_up", "parameters": SCHEMA},
    "/v1/messages": {"name": "look_up", "input_schema": SCHEMA},
}
ENDS: dict[str, dict[str, Any]] = {
    "stop": {},
    "length": {"finish_reason": "length"},
    "tool": {"tool_call": {"name": "look_up", "arguments": '{"q": "x"}'}},
}


@pytest.fixture
def post(gateway, key):
    def send(route: str, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, **PLAIN[route][1], **fields}
        response = httpx.post(gateway.base + route, json=body, headers={"authorization": f"Bearer {key}"}, timeout=20)
        assert response.status_code == 200, response.text
        return response

    yield send
    gateway.control()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("route", PLAIN)
def test_bodies(gateway, post, route, end):
    gateway.control(num_tokens=4, **ENDS[end])
    tools = {"tools": [TOOLS[route]]} if end == "tool" and route in TOOLS else {}
    TypeAdapter(PLAIN[route][0]).validate_python(post(route, **tools).json())


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("route", STREAMED)
def test_events(gateway, post, route, end):
    gateway.control(num_tokens=4, **ENDS[end])
    kind, fields = STREAMED[route]
    tools = {"tools": [TOOLS[route]]} if end == "tool" else {}
    lines = [line[6:] for line in post(route, stream=True, **fields, **tools).text.splitlines() if line[:6] == "data: "]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert len(events) > 4
    for event in events:
        TypeAdapter(kind).validate_python(event)


@pytest.mark.parametrize(
    ("headers", "kind"), [({}, openai.Model), ({"anthropic-version": "2023-06-01"}, anthropic.ModelInfo)]
)
def test_models(gateway, key, headers, kind):
    headers = {"authorization": f"Bearer {key}", **headers}
    entries = httpx.get(f"{gateway.base}/v1/models", headers=headers).json()["data"]
    assert entries
    for entry in entries:
        TypeAdapter(kind).validate_python(entry)
        one = httpx.get(f"{gateway.base}/v1/models/{entry['id']}", headers=headers).json()
        TypeAdapter(kind).validate_python(one)


def test_errors(gateway):
    refused = httpx.post(f"{gateway.base}/v1/messages", json={}, headers={"x-api-key": "sr_wrong"})
    TypeAdapter(anthropic.ErrorResponse).validate_python(refused.json())
