"""For every way of cutting an engine's stream the deltas are the same, and no bytes make the parser fail otherwise."""

from __future__ import annotations

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.wire import EventParser
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
def test_cutting_changes_nothing(events: list[dict[str, object]], end: bytes, sizes: list[int]) -> None:
    stream = b"".join(b"data: " + orjson.dumps(event) + end for event in events) + b"data: [DONE]\n\n"
    pieces, at, index = [], 0, 0
    while at < len(stream):
        size = sizes[index % len(sizes)]
        pieces.append(stream[at : at + size])
        at, index = at + size, index + 1
    assert parsed(pieces) == parsed([stream])
    assert len(parsed(pieces)) == len(events)


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
