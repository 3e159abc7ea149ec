"""Requests as coding tools send them, made from the standard library's own source: no download, the same for a seed.

    edit    chat: change one function, answer with the whole of it
    review  chat: a diff of one function, remarks wanted
    fim     completion at a random cursor of a file
    agent   chat: sessions whose history grows turn by turn, so that each prompt begins with the one before
    repo    chat: a question over several files, as long as the limit allows

What an answer says does not steer what is sent next: an agent's own turns are taken from the source too. So every
server gets the same requests.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import random
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIN_FILE_BYTES, MAX_FILE_BYTES = 2_000, 120_000
MIN_LINES, MAX_LINES = 8, 60
AGENT_TURNS = 8
SYSTEM = "You are a careful engineer. Answer with code where code is asked for, and be brief."
EDITS = (
    "Add type annotations to every argument and the return value.",
    "Add a docstring that says what a caller can't see, and change nothing else.",
    "Rename the first argument to something that says more.",
    "Replace comparisons with None by `is` and `is not`, and change nothing else.",
)


@dataclass(frozen=True)
class Request:
    """One request, ready to send."""

    workload: str
    route: str
    body: bytes
    stream: bool


@dataclass(frozen=True)
class Options:
    """What all requests have in common.

    Attributes:
        model: The model's id.
        max_tokens: Of an answer; None takes what suits the workload.
        max_prompt_chars: Prompts are cut to it; three to four characters make a token.
        stream: Ask for events.
        fim: How a completion at a cursor is asked for: `suffix` sends the field of that name; anything else is a prompt
            with `{prefix}` and `{suffix}` in it, for servers that leave the model's markers to the caller.
        ignore_eos: Always make `max_tokens` tokens (vLLM's own field), so that runs have the same work.
    """

    model: str
    max_tokens: int | None = None
    max_prompt_chars: int = 8_000
    stream: bool = True
    fim: str = "suffix"
    ignore_eos: bool = False


@dataclass(frozen=True)
class Function:
    """A function of the corpus, with the file it stands in."""

    path: str
    source: str


@cache
def corpus() -> tuple[tuple[str, str], ...]:
    """Files of the standard library by their path in it, in order; no tests, nothing that was installed."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip"}
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if skipped & set(inside.parts) or not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            files.append((inside.as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a few files are in other encodings
    return tuple(files)


def corpus_digest() -> str:
    """SHA-256 over the corpus: two results with the same one were given the same requests for a seed."""
    digest = hashlib.sha256()
    for path, text in corpus():
        digest.update(path.encode() + b"\0" + text.encode() + b"\0")
    return digest.hexdigest()


@cache
def functions() -> tuple[Function, ...]:
    """Functions of the corpus that fit a screen."""
    found = []
    for path, text in corpus()[::4]:  # a quarter is plenty, and parsing takes seconds
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
                continue
            if MIN_LINES <= node.end_lineno - node.lineno + 1 <= MAX_LINES:
                found.append(Function(path, "".join(lines[node.lineno - 1 : node.end_lineno])))
    return tuple(found)


class _Maker:
    """Makes the bodies of one run."""

    def __init__(self, options: Options, rng: random.Random) -> None:
        self._options = options
        self._rng = rng
        self._session: list[dict[str, str]] = []
        self._turns_left = 0

    def _body(self, max_tokens: int, **fields: Any) -> bytes:
        options = self._options
        body: dict[str, Any] = {"model": options.model, "max_tokens": options.max_tokens or max_tokens}
        body |= {"temperature": 0, "stream": options.stream, **fields}
        if options.stream:
            body["stream_options"] = {"include_usage": True}
        if options.ignore_eos:
            body["ignore_eos"] = True
        return orjson.dumps(body)

    def _chat(self, workload: str, max_tokens: int, messages: list[dict[str, str]]) -> Request:
        body = self._body(max_tokens, messages=messages)
        return Request(workload, "chat/completions", body, self._options.stream)

    def _ask(self, workload: str, max_tokens: int, text: str) -> Request:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        return self._chat(workload, max_tokens, messages)

    def edit(self) -> Request:
        function = self._rng.choice(functions())
        code = function.source[: self._options.max_prompt_chars]
        task = self._rng.choice(EDITS)
        text = f"{task} Answer with the whole function.\n\n`{function.path}`:\n```python\n{code}```"
        return self._ask("edit", 256, text)

    def review(self) -> Request:
        function = self._rng.choice(functions())
        before = function.source.splitlines(keepends=True)
        after = list(before)
        # Two small changes of the kind reviews find: a line lost, a condition turned.
        del after[self._rng.randrange(1, len(after))]
        at = self._rng.randrange(len(after))
        after[at] = after[at].replace(" not ", " ").replace(" is ", " is not ").replace("<=", "<")
        diff = "".join(difflib.unified_diff(before, after, f"a/{function.path}", f"b/{function.path}"))
        diff = diff[: self._options.max_prompt_chars]
        return self._ask("review", 128, f"Review this diff. Name each defect with its line.\n\n```diff\n{diff}```")

    def fim(self) -> Request:
        path, text = self._rng.choice(corpus())
        cursor = self._rng.randrange(len(text) // 4, len(text))
        before = self._options.max_prompt_chars * 3 // 4
        prefix = f"# {path}\n" + text[max(0, cursor - before) : cursor]
        suffix = text[cursor : cursor + self._options.max_prompt_chars - before]
        if self._options.fim == "suffix":
            fields = {"prompt": prefix, "suffix": suffix}
        else:
            fields = {"prompt": self._options.fim.replace("{prefix}", prefix).replace("{suffix}", suffix)}
        return Request("fim", "completions", self._body(64, **fields), self._options.stream)

    def agent(self) -> Request:
        length = sum(len(message["content"]) for message in self._session)
        if not self._turns_left or length > self._options.max_prompt_chars * 3 // 4:
            task = (
                f"Task {self._rng.getrandbits(32):08x}: find where this program may lose data. Read files as you need."
            )
            self._session = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task}]
            self._turns_left = AGENT_TURNS
        else:
            function = self._rng.choice(functions())
            share = self._options.max_prompt_chars // AGENT_TURNS
            self._session = [
                *self._session,
                {"role": "assistant", "content": f"Show me {function.path}."},
                {"role": "user", "content": f"```python\n{function.source[:share]}```\nGo on."},
            ]
        self._turns_left -= 1
        return self._chat("agent", 96, self._session)

    def repo(self) -> Request:
        room = self._options.max_prompt_chars - 200
        parts = []
        while room > 200:
            path, text = self._rng.choice(corpus())
            part = f"=== {path} ===\n{text[: min(room, 12_000)]}\n"
            parts.append(part)
            room -= len(part)
        question = "Which of these files opens sockets or files, and in which functions? One line a file."
        return self._ask("repo", 128, "".join(parts) + "\n" + question)


WORKLOADS: dict[str, Callable[[_Maker], Request]] = {
    "edit": _Maker.edit,
    "review": _Maker.review,
    "fim": _Maker.fim,
    "agent": _Maker.agent,
    "repo": _Maker.repo,
}
MIXED = "edit=3,review=2,fim=6,agent=4,repo=1"


def parse_mix(given: str) -> dict[str, float]:
    """Read `edit`, `mixed` or `edit=3,fim=6`.

    Raises:
        ValueError: An unknown workload, or a weight that is not a number above 0.
    """
    mix = {}
    for part in (MIXED if given == "mixed" else given).split(","):
        name, _, weight = part.partition("=")
        try:
            share = float(weight or 1)
        except ValueError:
            share = 0.0
        if name not in WORKLOADS or not 0 < share < float("inf"):
            raise ValueError(
                f"'{part}' is not a workload with a weight, such as edit=3; there are {', '.join(WORKLOADS)}"
            )
        mix[name] = share
    return mix


def requests(mix: dict[str, float], options: Options, *, seed: int) -> Iterator[Request]:
    """Requests without end; the same for the same arguments.

    The source is read and parsed here and not at the first request: that takes seconds, in which no answer could be
    stamped.
    """
    corpus()
    functions()
    return _endless(mix, options, seed)


def _endless(mix: dict[str, float], options: Options, seed: int) -> Iterator[Request]:
    rng = random.Random(seed)
    maker = _Maker(options, rng)
    names, weights = list(mix), list(mix.values())
    while True:
        yield WORKLOADS[rng.choices(names, weights)[0]](maker)
