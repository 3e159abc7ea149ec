"""For every way of cutting an engine's stream the deltas are the same, and no bytes make the parser fail otherwise."""

from __future__ import annotations

import json
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.wire import EventParser, parse_usage
from server.errors import StrongroomError
from server.types import Delta

TEXTS = st.text(max_size=20)
EVENTS = st.lists(
    st.one_of(
        st.builds(lambda text: {"choices": [{"index": 0, "delta": {"content": text}}]}, TEXTS),
        st.builds(
            lambda text, index: {"choices": [{"index": index, "delta": {"reasoning": text}}]}, TEXTS, st.integers(0, 9)
        ),
        st.builds(lambda count: {"choices": [], "usage": {"prompt_tokens": count}}, st.integers(0, 10**6)),
    ),
    max_size=8,
)
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n", b"\n: keep-alive\n\n"])


def parsed(pieces: list[bytes]) -> list[Delta]:
    parser = EventParser(chat=True)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    assert parser.done
    return deltas


@settings(deadline=None)
@given(EVENTS, ENDS, st.lists(st.integers(1, 40), min_size=1))
def test_cutting_changes_nothing(events: list[dict[str, Any]], end: bytes, sizes: list[int]) -> None:
    stream = b"".join(b"data: " + orjson.dumps(event) + end for event in events) + b"data: [DONE]\n\n"
    pieces, at, index = [], 0, 0
    while at < len(stream):
        size = sizes[index % len(sizes)]
        pieces.append(stream[at : at + size])
        at, index = at + size, index + 1
    assert parsed(pieces) == parsed([stream])
    counts = [event["usage"] for event in events if "usage" in event]
    deltas = parsed(pieces)
    assert len(deltas) == len(events) - len(counts) + bool(counts)
    assert [delta.usage is not None for delta in deltas].count(True) == bool(counts)
    if counts:  # some engines count in every event; only the last count stands, and it ends the answer
        assert deltas[-1] == Delta(usage=parse_usage(counts[-1]))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_are_parsed_or_refused(pieces: list[bytes]) -> None:
    parser = EventParser(chat=True)
    try:
        for piece in pieces:
            parser.feed(b"data: " + piece + b"\n")
    except StrongroomError:
        pass


ANY: st.SearchStrategy[object] = (
    st.none()
    | st.integers(-5, 5)
    | st.text(max_size=3)
    | st.lists(st.none() | st.integers(0, 3), max_size=2)
    | st.just({})
)
DELTA = st.fixed_dictionaries({}, optional={"content": ANY, "reasoning": ANY, "tool_calls": ANY})
CHOICE = st.fixed_dictionaries(
    {}, optional={"index": ANY, "delta": DELTA | ANY, "text": ANY, "finish_reason": ANY, "logprobs": ANY}
)
USAGE = st.fixed_dictionaries(
    {}, optional={"prompt_tokens": ANY, "completion_tokens": ANY, "prompt_tokens_details": ANY}
)
EVENT = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.lists(CHOICE, max_size=2) | ANY,
        "usage": USAGE | ANY,
        "error": ANY | st.fixed_dictionaries({"code": ANY, "message": ANY}),
    },
)


@settings(deadline=None)
@given(EVENT | ANY, st.booleans())
def test_any_event_is_parsed_or_refused(event: object, chat: bool) -> None:
    try:
        deltas = EventParser(chat=chat).feed(b"data: " + orjson.dumps(event) + b"\n\n")
    except StrongroomError:
        return
    for delta in deltas:
        assert (type(delta.index), type(delta.text), type(delta.reasoning)) == (int, str, str)
        assert isinstance(delta.finish_reason, str | None)
        assert isinstance(delta.tool_calls, list | None)


FIELDS = st.sampled_from(
    [
        {},
        {"logprobs": None},
        {"logprobs": {"content": []}},
        {"finish_reason": "stop"},
        {"finish_reason": None, "token_ids": None},
        {"content": "twin"},
    ]
)
CHOICES = st.builds(
    lambda index, text, more, inner: {"index": index, "delta": {"content": text, **inner}, **more},
    st.sampled_from([0, 0, 0, 0, 1]),
    st.text(max_size=12) | st.just('","content":"'),
    FIELDS,
    st.sampled_from([{}, {}, {}, {"reasoning": "hm"}, {"tool_calls": None}, {"refusal": '"content":'}]),
)
STREAMS = st.lists(
    st.builds(
        lambda choices, usage, spaced: (choices, usage, spaced),
        st.lists(CHOICES, min_size=1, max_size=2),
        st.sampled_from([None, None, None, {"prompt_tokens": 3}]),
        st.booleans(),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(STREAMS)
def test_events_that_look_alike_are_read_as_if_each_stood_alone(stream) -> None:
    """The parser remembers what stands around the text of a plain event; that must change no delta."""
    lines = []
    for choices, usage, spaced in stream:
        event = {"id": "chatcmpl-1", "choices": choices, **({"usage": usage} if usage else {})}
        data = json.dumps(event).encode() if spaced else orjson.dumps(event)
        lines.append(b"data: " + data + b"\n\n")
    together, apart = EventParser(chat=True), [EventParser(chat=True).feed(line) for line in lines]
    assert together.feed(b"".join(lines)) == [delta for deltas in apart for delta in deltas]


@settings(deadline=None)
@given(st.text(max_size=8), st.binary(max_size=30))
def test_what_stands_where_the_text_was_is_never_taken_for_it(text: str, odd: bytes) -> None:
    """Bytes between the remembered halves of an event count only as what a JSON parser makes of the whole line."""
    head, tail = b'data: {"choices":[{"index":0,"delta":{"content":', b'},"finish_reason":null}]}\n\n'
    plain, line = head + orjson.dumps(text) + tail, head + odd + tail
    outcomes: list[list[Delta] | str] = []
    for pieces in ((plain, line), (line,)):
        parser = EventParser(chat=True)
        try:
            outcomes.append([d for piece in pieces for d in parser.feed(piece)][len(pieces) - 1 :])
        except StrongroomError as err:
            outcomes.append(err.code)
    assert outcomes[0] == outcomes[1]
