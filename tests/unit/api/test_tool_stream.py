"""Streamed tool calls in the three dialects that have them: ids and indexes that hold, whatever the engine repeats."""

import json
from typing import Any

import pytest

from server.api.chat import ChatFormat
from server.api.messages import MessageFormat
from server.api.responses import ResponseFormat
from server.types import Chat, Delta, ModelRequest, Outcome, WireFormat

REQUEST = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "x"},)), {}, stream=True)
CALLS = [("look", '{"path": "a.py"}'), ("add", '{"a": 1, "b": 2}')]


def piece(index: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"index": index, **fields}]


def spoken(*, ids: bool, repeats: bool) -> list[Delta]:
    """Two calls after some text, as an engine says them: with ids or without, with repeated names or without."""
    deltas = [Delta(text="Let me see. ")]
    for index, (name, arguments) in enumerate(CALLS):
        known = {"id": f"tool-{index}", "type": "function"} if ids else {}
        deltas.append(Delta(tool_calls=piece(index, **known, function={"name": name, "arguments": ""})))
        for at in range(0, len(arguments), 5):
            again = {**known, "type": "function"} if repeats else {}
            named = {"name": name} if repeats else {}
            text = arguments[at : at + 5]
            deltas.append(Delta(tool_calls=piece(index, **again, function={**named, "arguments": text})))
    return deltas


def events_of(fmt: Any, deltas: list[Delta]) -> list[dict[str, Any]]:
    reply = fmt.reply(REQUEST, "req_" + "0" * 24, 1)
    outcome = Outcome("completed", {0: "tool_calls"})
    data = reply.begin(0) + b"".join(reply.events([delta]) for delta in deltas)
    data += reply.end([Delta(finish_reason="tool_calls")], outcome)
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def by_chat(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Concatenate as the strictest clients do: every string of every piece, id and name too."""
    calls: dict[int, list[str]] = {}
    for event in events:
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls", ()):
                kept = calls.setdefault(call["index"], ["", "", ""])
                kept[0] += call.get("id", "")
                kept[1] += call["function"].get("name", "")
                kept[2] += call["function"].get("arguments", "")
    return [(call[0], call[1], call[2]) for _, call in sorted(calls.items())]


def by_messages(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    blocks: dict[int, list[str]] = {}
    for event in events:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            assert event["index"] not in blocks
            blocks[event["index"]] = [event["content_block"]["id"], event["content_block"]["name"], ""]
        if event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
            blocks[event["index"]][2] += event["delta"]["partial_json"]
    return [(block[0], block[1], block[2]) for _, block in sorted(blocks.items())]


def by_responses(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    streamed: dict[str, str] = {}
    for event in events:
        if event["type"] == "response.function_call_arguments.delta":
            streamed[event["item_id"]] = streamed.get(event["item_id"], "") + event["delta"]
    output = events[-1]["response"]["output"]
    calls = [item for item in output if item["type"] == "function_call"]
    assert [streamed[item["id"]] for item in calls] == [item["arguments"] for item in calls]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return [(item["call_id"], item["name"], item["arguments"]) for item in calls]


READERS = [(ChatFormat(), by_chat), (MessageFormat(), by_messages), (ResponseFormat(), by_responses)]


@pytest.mark.parametrize(("fmt", "read"), READERS)
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_calls_are_read_whole_with_one_id_each(fmt, read, ids, repeats):
    calls = read(events_of(fmt, spoken(ids=ids, repeats=repeats)))
    assert [(name, arguments) for _, name, arguments in calls] == CALLS
    if ids:
        assert [call_id for call_id, _, _ in calls] == ["tool-0", "tool-1"]
    else:
        assert len({call_id for call_id, _, _ in calls}) == 2
        assert all(call_id.startswith("call_") for call_id, _, _ in calls)


@pytest.mark.parametrize(("fmt", "read"), READERS)
def test_an_id_that_is_drawn_differs_from_turn_to_turn(fmt, read):
    deltas = spoken(ids=False, repeats=False)
    first, second = read(events_of(fmt, deltas)), read(events_of(fmt, deltas))
    assert not {call[0] for call in first} & {call[0] for call in second}


@pytest.mark.parametrize("fmt", [ChatFormat(), MessageFormat(), ResponseFormat()])
def test_a_plain_answer_has_the_same_calls(fmt):
    deltas = [*spoken(ids=True, repeats=True), Delta(finish_reason="tool_calls")]
    body = json.loads(fmt.reply(REQUEST, "req_" + "0" * 24, 1).whole(deltas, Outcome("completed", {0: "tool_calls"})))
    text = json.dumps(body)
    for number, (name, _) in enumerate(CALLS):
        assert text.count(f'"tool-{number}"') == 1
        assert f'"name": "{name}"' in text
