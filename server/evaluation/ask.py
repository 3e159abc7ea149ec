"""Puts the questions to served endpoints, the arms interleaved, and keeps every answer in a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from typing_extensions import override

from server.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from server.evaluation.sets import Question

MAX_TRIES = 6


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to reach a model: an address, a key whose policy decides the template, a model id."""

    name: str
    base_url: str
    key: str
    model: str

    @override
    def __repr__(self) -> str:
        return f"Arm({self.name!r}, {self.base_url!r}, <redacted>, {self.model!r})"


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


def parse_arm(name: str, env: dict[str, str]) -> Arm:
    """Return the arm that a `client.env` describes.

    Raises:
        ConfigError: The file lacks a value.
    """
    missing = [key for key in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "MODEL") if not env.get(key)]
    if missing:
        raise ConfigError(f"The env file of arm {name!r} lacks {missing[0]}. Use a client.env as the server writes it.")
    return Arm(name, env["OPENAI_BASE_URL"].rstrip("/"), env["OPENAI_API_KEY"], env["MODEL"])


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
    timeout = aiohttp.ClientTimeout(total=600)
    with path.open("a", encoding="utf-8") as file:
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def one(arm: Arm, question: Question, seed: int) -> Answer:
                answer = known.get((arm.name, question.key, seed))
                if answer is None:
                    async with gate:
                        answer = await _ask(session, arm, question, seed, sampling)
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


async def _ask(session: aiohttp.ClientSession, arm: Arm, question: Question, seed: int, sampling: Sampling) -> Answer:
    word = canary(question, seed)
    body = {
        "model": arm.model,
        "messages": [{**m, "content": m["content"].replace("CANARY", word)} for m in question.messages],
        "seed": seed,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    headers = {"Authorization": f"Bearer {arm.key}"}
    start = time.monotonic()
    data: dict[str, Any] = {}
    error, template, digest = "unreachable", "", ""
    for attempt in range(MAX_TRIES):
        try:
            async with session.post(f"{arm.base_url}/chat/completions", json=body, headers=headers) as response:
                template = response.headers.get("x-strongroom-template", "")
                digest = response.headers.get("x-strongroom-template-digest", "")
                data = await response.json(content_type=None)
                if response.status == 200:
                    error = ""
                    break
                error = str((data.get("error") or {}).get("code") or response.status)
                if response.status not in (429, 502, 503):
                    break
                wait_s = float(response.headers.get("retry-after") or 1)
        except (aiohttp.ClientError, TimeoutError, ValueError) as err:
            error, wait_s = type(err).__name__, 1.0
        await asyncio.sleep(min(wait_s * (attempt + 1), 30))
    text, num_tokens = "", 0
    if not error:
        text = str(data["choices"][0]["message"].get("content") or "")
        num_tokens = int((data.get("usage") or {}).get("completion_tokens") or 0)
    seconds = time.monotonic() - start
    return Answer(arm.name, question.key, seed, text, error, template, digest, round(seconds, 3), num_tokens)
