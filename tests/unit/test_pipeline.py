"""The model asked once more for the same request: what it cost is on the request, however it ended."""

from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.errors import ContextLengthError, EngineError, EngineUnavailableError, RateLimitedError
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


class Reservation:
    """Has room, or none."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.held: list[tuple[int, int]] = []
        self.charged: list[Usage] = []

    @asynccontextmanager
    async def extend(self, *, prompt_tokens: int, max_tokens: int) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.held.append((prompt_tokens, max_tokens))
        spent = Usage()
        try:
            yield spent
        finally:
            self.charged.append(spent)


def asker(model: Model, reservation: Reservation, call: Call) -> Any:
    request = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "hi"},)), {"n": 3})
    return follow_up(cast("Any", model), request, Obligations(), cast("Any", None), call, cast("Any", reservation))


def new_call() -> Call:
    return cast("Call", SimpleNamespace(id="r", outcome=Outcome()))


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
    call, reservation = new_call(), Reservation()
    ask = asker(Model(words, end), reservation, call)
    with suppress(EngineError, EngineUnavailableError):
        assert await ask("again") == "four" * words
    spent = call.outcome.extra_usage
    assert (spent.prompt_tokens, spent.completion_tokens) == cost
    assert reservation.held == [(30, 9)]  # before anything ran, for one choice, whatever the request asked for
    assert reservation.charged == [spent]


@pytest.mark.parametrize("refusal", [RateLimitedError("no", retry_after_s=1), None])
async def test_a_turn_without_room_never_runs(refusal):
    model = Model(4, END)
    if refusal is None:

        def clamp(*_args: Any) -> int:
            raise ContextLengthError(limit_tokens=20, prompt_tokens=30)

        model.clamp = clamp  # type: ignore[method-assign]
    call, reservation = new_call(), Reservation(refusal)
    assert await asker(model, reservation, call)("again") is None
    assert call.outcome.extra_usage == Usage()
    assert reservation.charged == []
