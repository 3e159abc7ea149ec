"""The two gateways that clients are driven against: one whose engine follows a script, one with real vLLM."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import httpx
import yaml
from typing_extensions import override

from benchmarks.gateway.kit import EMBEDDER, MODEL, GatewayKit, make_kit, wait_until
from server.bootstrap import read_env
from tests.clients.drive import ROOT
from tests.clients.long_context import FULL_STOP, MAX_MODEL_LEN, seal_profile, write_config
from tests.clients.long_context import MODEL as REAL_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

ANSWER = "Strongroom says pong."
SHORT_LEN = 4096
LONG_STORY = "Write a very long story about a ship and the sea."
RULES = [{"per": "subject", "name": "throttled", "concurrent": 1}]
T = TypeVar("T")


class Gateway(Protocol):
    """What a client is driven against. `throttled` is the key of a subject that may have one request at a time."""

    base: str
    key: str
    throttled: str
    model: str
    small: str
    small_len: int
    limit_s: float
    tool: str  # what a library is told to do for a tool call

    def answer(self, **script: Any) -> None:
        """Have the engine say the sentence, or what the test wants, where it can be told."""
        ...

    def is_answer(self, text: str) -> bool:
        """Whether a client's text is what the engine answered."""
        ...

    def shows_answer(self, out: str, responses: bytes) -> bool:
        """Whether what a client printed has an answer of the engine in it, as it was on the wire."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Keep the throttled subject's only place taken."""
        ...


@contextmanager
def held(gateway: Gateway, **changed: Any) -> Iterator[None]:
    """Keep a stream of the throttled subject open."""
    body = {"model": gateway.model, "stream": True, "messages": [{"role": "user", "content": LONG_STORY}], **changed}
    headers = {"authorization": f"Bearer {gateway.throttled}"}
    with httpx.stream("POST", f"{gateway.base}/v1/chat/completions", json=body, headers=headers, timeout=60) as holder:
        lines = holder.iter_lines()
        next(lines)  # the iterator is kept: letting go of it would close the stream
        yield


def client_meets_a_limit(gateway: Gateway, ask: Callable[[], T], wire: Path) -> T:
    """Hold the throttled subject's only place until the client was refused, then let go of it."""
    outcomes: list[T] = []
    with gateway.hold():
        client = threading.Thread(target=lambda: outcomes.append(ask()), daemon=True)
        client.start()
        wait_until(lambda: any(b" 429 " in path.read_bytes() for path in wire.glob("*.response")))
    client.join(gateway.limit_s + 30)
    (outcome,) = outcomes
    return outcome


@dataclass
class Scripted(Gateway):
    """The engine follows a script."""

    kit: GatewayKit
    key: str
    throttled: str

    def __post_init__(self) -> None:
        self.base = self.kit.base
        self.model = MODEL
        self.small = "small"
        self.small_len = SHORT_LEN
        self.limit_s = 90.0
        self.tool = "tool"

    @override
    def answer(self, **script: Any) -> None:
        self.kit.control(**{"text": ANSWER, "num_tokens": 5, **script})

    @override
    def is_answer(self, text: str) -> bool:
        return text == ANSWER

    @override
    def shows_answer(self, out: str, responses: bytes) -> bool:
        return ANSWER in out

    @override
    @contextmanager
    def hold(self) -> Iterator[None]:
        self.answer(hang_after=2)
        with held(self):
            self.answer()
            yield


@contextmanager
def scripted_gateway(state: Path) -> Iterator[Scripted]:
    """Run one; the model `small` has 4,096 tokens."""
    limits = state.parent / "limits.yaml"
    limits.write_text(yaml.safe_dump({"max_wait_s": 1, "limits": RULES}), encoding="utf-8")
    models = [
        {"id": MODEL, "path": f"models/{MODEL}", "aliases": ["autocomplete"], "engine": {"max_model_len": 131072}},
        {"id": EMBEDDER, "path": f"models/{EMBEDDER}", "aliases": ["small"], "engine": {"max_model_len": SHORT_LEN}},
    ]
    kit = make_kit(state, models=models, limits={"file": str(limits)}, public={"heartbeat_s": 10.0})
    try:
        kit.start()
        keys = [kit.new_key(groups={"developers"}, subject=who) for who in ("somebody", "throttled")]
        for key in keys:
            kit.wait_for_key(key)
        yield Scripted(kit, *keys)
    finally:
        kit.stop()


@dataclass
class Real(Gateway):
    """The engine is vLLM, its model the one of `long_context.py`."""

    base: str
    key: str
    throttled: str
    model: str = REAL_MODEL
    small: str = REAL_MODEL
    small_len: int = MAX_MODEL_LEN
    limit_s: float = 600.0
    tool: str = "forced"

    @override
    def answer(self, **script: Any) -> None:
        """It says what it says."""

    @override
    def is_answer(self, text: str) -> bool:
        return bool(text.strip())

    @override
    def shows_answer(self, out: str, responses: bytes) -> bool:
        shown = letters(re.sub(r"\\[nrt]", "", out))
        said = [letters(text) for text in streamed_texts(responses)]
        print(said)
        return any(text and text[:12] in shown for text in said)

    @override
    def hold(self) -> AbstractContextManager[None]:
        return held(self, logit_bias={str(FULL_STOP): -100})


@contextmanager
def real_gateway(state: Path, folder: Path, port: int) -> Iterator[Real]:
    """`strongroom serve` with the long-context profile; `state` is kept, since sealing takes a minute."""
    seal_profile(state)
    limits = folder / "limits.yaml"
    limits.write_text(yaml.safe_dump({"max_wait_s": 1, "limits": RULES}), encoding="utf-8")
    config = write_config(state, folder, port, limits)
    command = [sys.executable, "-m", "server.cli"]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "serve", "--config", str(config), "--prepare-embedded"],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        base = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert process.poll() is None, (folder / "serve.log").read_text(encoding="utf-8")
            return httpx.get(f"{base}/readyz").status_code == 200

        wait_until(ready, limit_s=900, pause_s=0.5)
        key = read_env(state / "client.env")["OPENAI_API_KEY"]
        made = subprocess.run(
            [*command, "keys", "create", "--state", str(state), "--json", "--subject", "throttled", "--tenant", "local",
             "--group", "developers"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        throttled = json.loads(made.stdout)["key"]
        headers = {"authorization": f"Bearer {throttled}"}
        wait_until(lambda: httpx.get(f"{base}/v1/models", headers=headers).status_code == 200)
        yield Real(base, key, throttled)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def letters(text: str) -> str:
    """The text without what terminals and JSON change."""
    return re.sub(r"\W", "", text)


def streamed_texts(responses: bytes) -> list[str]:
    """What each stream on the wire said, whichever of the three formats it has."""
    said: list[str] = []
    for part in responses.decode(errors="replace").split("HTTP/1.1 "):
        text = ""
        for line in re.findall(r"^data: (\{.*\})\r?$", part, flags=re.MULTILINE):
            event = json.loads(line)
            delta = event.get("delta") or {}
            text += delta if isinstance(delta, str) else delta.get("text") or ""
            for choice in event.get("choices") or []:
                text += (choice.get("delta") or {}).get("content") or ""
        said.append(text)
    return said
