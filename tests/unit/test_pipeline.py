"""The model asked once more for the same request: what it cost is on the request, however it ended."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.errors import EngineError, EngineUnavailableError
from server.pipeline import Call, follow_up
from server.types import Chat, Delta, ModelRequest, Obligations, Outcome, Usage, WireFormat

WORD = Delta(text="four")
END = Delta(usage=Usage(30, 4))


class Model:
    """Answers with so many words, and then with its usage or an error."""

    def __init__(self, words: int, end: Delta | Exception) -> None:
        self.words = words
        self.end = end

    async def render(self, *_args: Any) -> Any:
        return SimpleNamespace(num_tokens=30)

    def clamp(self, *_args: Any) -> int:
        return 9

    async def stream(self, *_args: Any, **_named: Any) -> Any:
        for _ in range(self.words):
            yield [WORD]
        if isinstance(self.end, Exception):
            raise self.end
        yield [self.end]


@pytest.mark.parametrize(
    ("words", "end", "cost"),
    [
        (4, END, (30, 4)),
        (3, EngineError("cut off"), (30, 3)),
        (3, EngineUnavailableError("died"), (30, 3)),
        (0, EngineUnavailableError("down"), (0, 0)),
    ],
)
async def test_a_turn_that_was_cut_off_is_charged_too(words, end, cost):
    call = cast("Call", SimpleNamespace(id="r", outcome=Outcome()))
    request = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "hi"},)), {})
    ask = follow_up(cast("Any", Model(words, end)), request, Obligations(), cast("Any", None), call)
    assert ask is not None
    with suppress(EngineError, EngineUnavailableError):
        assert await ask("again") == "four" * words
    spent = call.outcome.extra_usage
    assert (spent.prompt_tokens, spent.completion_tokens) == cost
