"""Clients that can't be installed here: the requests they were recorded to send, and the answers that they need.

These run in `make test` too. What each needs is what its source was read to do with an answer: Zed has strict types,
Tabby panics on a chunk that it can't read, minuet throws three requests away at each pause in typing.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, wait_until
from tests.clients.gateways import ANSWER

if TYPE_CHECKING:
    from tests.clients.gateways import Scripted

TOOL = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
# Route and body of each client's main request, as recorded or read (without the model).
SENT: dict[str, tuple[str, dict[str, Any]]] = {
    "Zed": ("/v1/chat/completions", {
        "messages": CHAT, "stream": True, "max_completion_tokens": 4096, "stop": [], "temperature": 1.0,
        "tool_choice": "auto", "parallel_tool_calls": False, "prompt_cache_key": "t", "tools": [TOOL],
        "stream_options": {"include_usage": True},
    }),
    "VS Code BYOK": ("/v1/responses", {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "stream": True, "store": True,
        "tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": False}],
        "truncation": "disabled", "include": ["reasoning.encrypted_content"],
    }),
    "Tabby": ("/v1/completions", {
        "prompt": "def add(a, b):", "suffix": "\nprint(1)", "max_tokens": 64, "temperature": 0.1, "stream": True,
        "presence_penalty": 0.0,
    }),
    "minuet": ("/v1/completions", {
        "prompt": "def add(a, b):", "suffix": "\nprint(1)", "stream": True, "max_tokens": 56, "top_p": 0.9,
    }),
    "llama.vscode": ("/infill", {
        "input_prefix": "def add(a, b):", "input_suffix": "\nprint(1)", "prompt": "    ", "input_extra": [],
        "n_predict": 32, "top_k": 40, "top_p": 0.99, "stream": False, "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True, "id_slot": 0, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "n_indent": 4,
    }),
    "Open WebUI": ("/v1/chat/completions", {
        "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}, "metadata": {"chat_id": "x"},
    }),
    "JetBrains": ("/v1/chat/completions", {"messages": CHAT, "stream": True, "temperature": 0.2, "n": 1}),
}  # fmt: skip
names = pytest.mark.parametrize("name", list(SENT))


def send(
    scripted: Scripted, name: str, *, key: str | None = None, model: str = MODEL, **changed: Any
) -> httpx.Response:
    route, body = SENT[name]
    headers = {"authorization": f"Bearer {key or scripted.key}", "x-openwebui-user-name": "Ada"}
    sent = {"model": model, **body, **changed}
    return httpx.post(scripted.kit.base + route, json=sent, headers=headers, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """All events but `[DONE]`; clients parse every `data:` line as JSON."""
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.shows("exchange", how="replayed")
@names
def test_the_answer_has_what_the_client_reads(scripted, name):
    scripted.answer()
    response = send(scripted, name)
    assert response.status_code == 200, response.text
    match name:
        case "llama.vscode":
            assert response.json()["content"] == ANSWER
        case "VS Code BYOK":
            done = events(response)[-1]
            assert done["type"] == "response.completed"
            assert done["response"]["output"][0]["content"][0]["text"] == ANSWER
            assert done["response"]["id"]
        case "Tabby" | "minuet":
            assert "".join(c["choices"][0]["text"] for c in events(response) if c["choices"]) == ANSWER
        case _:
            said = [c["choices"][0]["delta"].get("content") or "" for c in events(response) if c["choices"]]
            assert "".join(said) == ANSWER


@pytest.mark.shows("streams", how="replayed")
@pytest.mark.parametrize("name", [name for name in SENT if name != "llama.vscode"])
def test_every_event_is_one_that_the_client_can_read(scripted, name):
    scripted.answer()
    response = send(scripted, name)
    assert response.headers["content-type"].startswith("text/event-stream")
    seen = events(response)
    if name == "VS Code BYOK":
        assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
        return
    for event in seen:  # Zed: every event has `choices`, each an index, and usage all three counts
        assert all(isinstance(choice["index"], int) for choice in event["choices"])
        if event.get("usage"):
            assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(event["usage"])
    finished = [event["choices"][0]["finish_reason"] for event in seen if event["choices"]]
    assert finished[-1] == "stop"  # Tabby crashes on a [DONE] before it
    assert set(finished[:-1]) == {None}
    assert response.text.rstrip().endswith("data: [DONE]")


@pytest.mark.shows("bad key", how="replayed")
@names
def test_a_wrong_key(scripted, name):
    response = send(scripted, name, key="sr_wrong")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert isinstance(response.json()["error"]["message"], str)


@pytest.mark.shows("unknown model", how="replayed")
@names
def test_an_unknown_model(scripted, name):
    response = send(scripted, name, model="no-such-model")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "no-such-model" in response.json()["error"]["message"]


@pytest.mark.shows("too long", how="replayed")
@pytest.mark.parametrize("name", ["Zed", "VS Code BYOK", "Open WebUI", "JetBrains"])
def test_a_prompt_that_does_not_fit(scripted, name):
    key = "input" if name == "VS Code BYOK" else "messages"
    changed: dict[str, Any] = {key: [{"role": "user", "content": "word " * 3000}]}
    response = send(scripted, name, model="small", **changed)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in response.json()["error"]["message"]


@pytest.mark.shows("too long", how="replayed")
@pytest.mark.parametrize("name", ["Tabby", "minuet", "llama.vscode"])
def test_code_that_does_not_fit_is_cut_around_the_cursor(scripted, name):
    scripted.answer()
    key = "input_prefix" if name == "llama.vscode" else "prompt"
    changed: dict[str, Any] = {key: "word = 1\n" * 3000}
    response = send(scripted, name, model="small", **changed)
    assert response.status_code == 200, response.text


@pytest.mark.shows("rate limit", how="replayed")
@names
def test_a_refusal_says_when_to_come_back_in_whole_seconds(scripted, name):
    scripted.answer(hang_after=2)
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hold"}]}
    headers = {"authorization": f"Bearer {scripted.throttled}"}
    url = scripted.kit.base + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as holder:
        lines = holder.iter_lines()
        next(lines)
        response = send(scripted, name, key=scripted.throttled)
    assert response.status_code == 429
    assert response.headers["retry-after"].isdigit()
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    wait_until(lambda: scripted.kit.stats()["running"] == 0, limit_s=10)


@pytest.mark.shows("tool call", how="replayed")
@pytest.mark.parametrize("name", ["Zed", "VS Code BYOK"])
def test_a_tool_call_is_in_one_piece_for_a_client_that_joins_by_index(scripted, name):
    scripted.answer(tool_call={"name": "look_up", "arguments": '{"q": "pong"}'})
    seen = events(send(scripted, name))
    if name == "VS Code BYOK":
        items = [event["item"] for event in seen if event["type"] == "response.output_item.done"]
        (call,) = [item for item in items if item["type"] == "function_call"]
        assert (call["name"], call["arguments"]) == ("look_up", '{"q": "pong"}')
        assert call["call_id"]
        return
    calls = [c for e in seen if e["choices"] for c in e["choices"][0]["delta"].get("tool_calls") or []]
    assert {call["index"] for call in calls} == {0}
    assert [call["function"]["name"] for call in calls if call["function"].get("name")] == ["look_up"]
    assert len({call["id"] for call in calls if call.get("id")}) == 1
    assert "".join(call["function"].get("arguments") or "" for call in calls) == '{"q": "pong"}'


def test_tabby_sends_no_suffix_as_null(scripted):
    scripted.answer()
    assert send(scripted, "Tabby", suffix=None).status_code == 200


def test_vs_code_goes_on_from_an_answer_that_it_had_stored(scripted):
    scripted.answer()
    first = events(send(scripted, "VS Code BYOK"))[-1]["response"]
    again = send(scripted, "VS Code BYOK", previous_response_id=first["id"])
    assert again.status_code == 200, again.text


def test_lists_of_models_are_short_and_name_no_folder(scripted):
    headers = {"authorization": f"Bearer {scripted.key}"}
    response = httpx.get(scripted.kit.base + "/v1/models", headers=headers)
    entries = response.json()["data"]
    assert {"id", "object", "created", "owned_by"} <= set(entries[0])
    assert str(scripted.kit.state) not in response.text


def test_three_completions_at_once_are_gone_when_their_sockets_are(scripted):
    """minuet kills its three curls at the next pause in typing."""
    scripted.answer(num_tokens=2000, delay_ms=20, text="x" * 8000)
    route, body = SENT["minuet"]
    headers = {"authorization": f"Bearer {scripted.key}"}

    def one(_: int) -> None:
        with httpx.stream(
            "POST", scripted.kit.base + route, json={"model": MODEL, **body}, headers=headers, timeout=30
        ) as response:
            assert next(response.iter_raw())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    wait_until(lambda: scripted.kit.stats()["running"] == 0, limit_s=2)
