"""The Python SDKs, driven for real: exchanges, streams, tools, error classes."""

from typing import Any

import anthropic
import httpx
import openai
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
}


@pytest.fixture
def sdk(gateway, key):
    gateway.control(num_tokens=8)
    with openai.OpenAI(base_url=gateway.base + "/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
def claude(gateway, key):
    gateway.control(num_tokens=8)
    with anthropic.Anthropic(base_url=gateway.base, api_key=key, max_retries=0) as client:
        yield client


def test_openai_chat_plain_and_streamed(sdk):
    plain = sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert plain.choices[0].message.content
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    assert plain._request_id.startswith("req_")
    chunks = list(
        sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_openai_stream_without_usage_has_a_choice_in_every_chunk(sdk):
    assert all(c.choices for c in sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))


def test_openai_completions_with_and_without_suffix(sdk):
    plain = sdk.completions.create(model=MODEL, prompt="def add(a, b):", max_tokens=8)
    assert plain.choices[0].text
    middle = sdk.completions.create(model=MODEL, prompt="def add(a, b):", suffix="\nprint(add(1, 2))", max_tokens=8)
    assert middle.choices[0].text
    stream = sdk.completions.create(model=MODEL, prompt="x = ", max_tokens=8, stream=True, stop=["\n"] * 20)
    assert "".join(c.choices[0].text for c in stream if c.choices)


def test_openai_embeddings_as_base64_and_as_floats(sdk):
    ours = sdk.embeddings.create(model=EMBEDDER, input=["one", "two"])  # the SDK asks for base64
    plain = sdk.embeddings.create(model=EMBEDDER, input=["one", "two"], encoding_format="float")
    assert [d.index for d in ours.data] == [0, 1]
    for first, second in zip(ours.data, plain.data, strict=True):
        assert first.embedding == pytest.approx(second.embedding, rel=1e-6)


def test_openai_responses_plain_and_streamed(sdk):
    plain = sdk.responses.create(model=MODEL, input="hi")
    assert plain.output_text
    events = list(sdk.responses.create(model=MODEL, input="hi", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == plain.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_openai_tools_plain_and_streamed(gateway, sdk):
    gateway.control(tool_call={"name": "look_up", "arguments": '{"q": "x"}'})
    plain = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required")
    (call,) = plain.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("look_up", '{"q": "x"}')
    assert plain.choices[0].finish_reason == "tool_calls"
    with sdk.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[TOOL]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"q": "x"}'
    items = sdk.responses.create(
        model=MODEL, input="hi", tools=[{"type": "function", **TOOL["function"]}], tool_choice="required"
    ).output
    assert [(item.type, item.name) for item in items] == [("function_call", "look_up")]


def test_openai_models(sdk):
    assert MODEL in {model.id for model in sdk.models.list()}
    assert sdk.models.retrieve(MODEL).id == MODEL


def test_openai_error_classes(gateway, sdk, visitor_key):
    with pytest.raises(openai.AuthenticationError) as refused:
        sdk.with_options(api_key="sr_wrong").chat.completions.create(model=MODEL, messages=MESSAGES)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        sdk.with_options(api_key=visitor_key).chat.completions.create(model=MODEL, messages=MESSAGES)
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length" in long.value.message
    assert "prompt is too long" in long.value.message  # by these words LangChain and Claude Code know it
    gateway.control(status=500)
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model=MODEL, messages=MESSAGES)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions", "/v1/models"])
def test_a_wrong_key_is_not_tried_again(gateway, path):
    """Claude Code asks ten times more with a key that was refused, unless the answer says that it is of no use."""
    response = httpx.request(
        "GET" if path == "/v1/models" else "POST", gateway.base + path, json={}, headers={"x-api-key": "sr_wrong"}
    )
    assert (response.status_code, response.headers["x-should-retry"]) == (401, "false")


def test_openai_sees_a_broken_stream_as_an_error(gateway, sdk):
    gateway.control(cut_after=3, num_tokens=10)
    with pytest.raises(openai.APIError) as broken:
        list(sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))
    assert "engine" in broken.value.message.lower()


def test_anthropic_messages_plain_and_streamed(claude):
    plain = claude.messages.create(model=MODEL, max_tokens=32, messages=MESSAGES, system="Be brief.")
    assert plain.content[0].text
    assert plain.stop_reason == "end_turn"
    with claude.messages.stream(model=MODEL, max_tokens=32, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == plain.content[0].text
    assert final.usage.output_tokens > 0


def test_responses_say_what_was_asked_in_their_own_form(gateway, sdk):
    gateway.control(tool_call={"name": "look_up", "arguments": '{"q": "x"}'})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    answer = sdk.responses.create(
        model=MODEL, input="hi", tools=[{"type": "function", "name": "look_up", "parameters": schema}],
        tool_choice={"type": "function", "name": "look_up"}, parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "r", "schema": schema}},
    )  # fmt: skip
    assert answer.tool_choice.to_dict() == {"type": "function", "name": "look_up"}
    assert answer.parallel_tool_calls is False
    assert (answer.text.format.type, answer.text.format.name, answer.text.format.schema_) == (
        "json_schema",
        "r",
        schema,
    )


def test_anthropic_names_the_stop_sequence_that_ended_an_answer(gateway, claude):
    gateway.control(text="one, two; three", num_tokens=4)
    ask = {"model": MODEL, "max_tokens": 32, "messages": MESSAGES, "stop_sequences": ["four", ";"]}
    plain = claude.messages.create(**ask)
    with claude.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    for message in (plain, streamed):
        assert message.content[0].text == "one, two"
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ";")
    other = claude.messages.create(**{**ask, "stop_sequences": ["four"]})
    assert (other.stop_reason, other.stop_sequence) == ("end_turn", None)


def test_anthropic_streams_begin_with_the_size_of_the_prompt(claude):
    counted = claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
    with claude.messages.create(model=MODEL, max_tokens=32, messages=MESSAGES, stream=True) as events:
        (start,) = [event for event in events if event.type == "message_start"]
    assert start.message.usage.input_tokens == counted > 0


def test_anthropic_waits_for_tool_use_of_a_forced_tool(gateway, claude):
    """Of a tool that was named, an engine says that it stopped."""
    tool = {"name": "look_up", "input_schema": TOOL["function"]["parameters"]}
    gateway.control(tool_call={"name": "look_up", "arguments": '{"q": "x"}'}, tool_finish_reason="stop")
    ask = {"model": MODEL, "max_tokens": 32, "messages": MESSAGES, "tools": [tool]}
    ask["tool_choice"] = {"type": "tool", "name": "look_up"}
    assert claude.messages.create(**ask).stop_reason == "tool_use"
    with claude.messages.stream(**ask) as stream:
        assert stream.get_final_message().stop_reason == "tool_use"


def test_anthropic_tools_and_counts(gateway, claude):
    tool = {"name": "look_up", "input_schema": TOOL["function"]["parameters"]}
    gateway.control(tool_call={"name": "look_up", "arguments": '{"q": "x"}'})
    plain = claude.messages.create(
        model=MODEL, max_tokens=32, messages=MESSAGES, tools=[tool], tool_choice={"type": "any"}
    )
    assert plain.stop_reason == "tool_use"
    assert plain.content[-1].input == {"q": "x"}
    with claude.messages.stream(model=MODEL, max_tokens=32, messages=MESSAGES, tools=[tool]) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == {"q": "x"}
    assert claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 0


def test_anthropic_error_classes(gateway, claude):
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="sr_wrong").messages.create(model=MODEL, max_tokens=8, messages=MESSAGES)
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nope", max_tokens=8, messages=MESSAGES)
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=MODEL, max_tokens=8, messages=[{"role": "user", "content": "word " * 9000}])


def test_agents_odd_fields_are_taken(gateway, key):
    gateway.control(num_tokens=8)
    headers = {"authorization": f"Bearer {key}"}
    codex = {
        "model": MODEL, "stream": True, "store": False, "include": ["reasoning.encrypted_content"],
        "instructions": "You are a coding agent.", "prompt_cache_key": "x", "parallel_tool_calls": False,
        "client_metadata": {"a": "b"}, "reasoning": {"effort": "low"}, "text": {"verbosity": "low"},
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "more"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "tools": [
            {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {}}, "strict": False},
            {"type": "namespace", "name": "mcp", "tools": []}, {"type": "web_search"},
        ],
        "tool_choice": "auto",
    }  # fmt: skip
    response = httpx.post(gateway.base + "/v1/responses", json=codex, headers=headers)
    assert response.status_code == 200, response.text
    assert "event: response.completed" in response.text
    claude_code = {
        "model": MODEL, "max_tokens": 32000, "stream": True, "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"}, "context_management": {"edits": []}, "metadata": {"user_id": "x"},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
            {"role": "system", "content": "late rules"},
        ],
        "tools": [{"name": "Bash", "description": "run", "input_schema": {"type": "object", "properties": {}}},
                  {"type": "web_search_20250305", "name": "web_search"}],
    }  # fmt: skip
    response = httpx.post(gateway.base + "/v1/messages?beta=true", json=claude_code, headers={"x-api-key": key})
    assert response.status_code == 200, response.text
    assert "event: message_stop" in response.text
