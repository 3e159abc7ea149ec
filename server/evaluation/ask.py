"""Puts the questions to served endpoints, the arms interleaved, and keeps every answer in a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from server.errors import EngineError
from server.pipelines.endpoint import Caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from server.evaluation.sets import Question
    from server.pipelines.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to reach a model: an endpoint whose key's policy decides the template."""

    name: str
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `template` and `digest` are response headers; `error` is the code where there is no text."""

    arm: str
    key: str
    seed: int
    text: str
    error: str
    template: str
    digest: str
    seconds: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    temperature: float
    max_tokens: int


def canary(question: Question, seed: int) -> str:
    """Return a word that no model knows, the same for each arm."""
    return "ZQ" + hashlib.sha256(f"{question.key}/{seed}".encode()).hexdigest()[:8].upper()


def load_answers(path: Path) -> dict[tuple[str, str, int], Answer]:
    """Return the answers that an earlier run has kept; failed ones are asked again."""
    if not path.exists():
        return {}
    answers = (Answer(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {(a.arm, a.key, a.seed): a for a in answers if not a.error}


async def ask_all(
    arms: Sequence[Arm],
    questions: Iterable[Question],
    seeds: range,
    sampling: Sampling,
    path: Path,
    *,
    concurrency: int,
    advance: Callable[[], None],
) -> list[Answer]:
    """Ask every question of every arm with every seed; answers go to `path` as they come, so that a run can go on.

    Raises:
        EngineError: An endpoint can't be reached, or refuses every question.
    """
    known = load_answers(path)
    gate = asyncio.Semaphore(concurrency)
    async with AsyncExitStack() as stack:
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        callers = {
            arm.name: await stack.enter_async_context(Caller(arm.endpoint, concurrency=concurrency)) for arm in arms
        }

        async def one(arm: Arm, question: Question, seed: int) -> Answer:
            answer = known.get((arm.name, question.key, seed))
            if answer is None:
                async with gate:
                    answer = await _ask(callers[arm.name], arm, question, seed, sampling)
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
            advance()
            return answer

        # Seed by seed and question by question over the arms: what drifts in time drifts for all arms alike.
        order = [(arm, q, seed) for seed in seeds for q in questions for arm in arms]
        answers = list(await asyncio.gather(*(one(*job) for job in order)))
    for arm in arms:
        own = [a for a in answers if a.arm == arm.name]
        if own and all(a.error for a in own):
            raise EngineError(f"Arm {arm.name!r} answered nothing: {own[0].error}. Check its address, key and model.")
    return answers


async def _ask(caller: Caller, arm: Arm, question: Question, seed: int, sampling: Sampling) -> Answer:
    word = canary(question, seed)
    body = {
        "model": arm.endpoint.model,
        "messages": [{**m, "content": m["content"].replace("CANARY", word)} for m in question.messages],
        "seed": seed,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    start = time.monotonic()
    reply = await caller.post("/chat/completions", body)
    text, num_tokens = "", 0
    if not reply.error:
        text = str(reply.body["choices"][0]["message"].get("content") or "")
        num_tokens = int((reply.body.get("usage") or {}).get("completion_tokens") or 0)
    return Answer(
        arm.name,
        question.key,
        seed,
        text,
        reply.error,
        reply.headers.get("x-strongroom-template", ""),
        reply.headers.get("x-strongroom-template-digest", ""),
        round(time.monotonic() - start, 3),
        num_tokens,
    )
