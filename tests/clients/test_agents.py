"""Agents and assistants, driven through a whole gateway: before an engine that follows a script, and before vLLM.

Tool calls are for the script alone: no small model calls a tool when it should, and agents force none.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.catalogue import CLIENTS, Target
from tests.clients.drive import Outcome, run
from tests.clients.gateways import client_meets_a_limit

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients.gateways import Gateway

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

QUESTIONS = ("Say pong.", "Write hello world in Python.", "What is a list in Python?")
LONG = "7 " * 22_000  # two tokens each, and still an argument that Linux takes
MADE = "made-by-a-tool.txt"
COMMAND = f"echo done > {MADE}"
# Each agent's own tool that runs a command, and how it wants to be called.
TOOL_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "llm": ("llm_version", {}),
    "codex": ("exec_command", {"cmd": COMMAND}),
    "claude": ("Bash", {"command": COMMAND, "description": "make a file"}),
    "opencode": ("bash", {"command": COMMAND, "description": "make a file"}),
    "qwen": ("run_shell_command", {"command": COMMAND, "is_background": False}),
    "cn": ("Bash", {"command": COMMAND}),
    "cline": ("run_commands", {"commands": [COMMAND]}),
}
names = pytest.mark.parametrize("name", list(CLIENTS))


def ask(
    gateway: Gateway, name: str, folder: Path, prompt: str = QUESTIONS[0], limit_s: float | None = None, **changed: str
) -> Outcome:
    """Run one client in folders of its own."""
    told = {"base": gateway.base, "key": gateway.key, "model": gateway.model} | changed
    target = Target(**told, home=folder / "home", work=folder / "work")
    outcome = run(CLIENTS[name], target, prompt, limit_s=limit_s or gateway.limit_s)
    print(name, f"{outcome.seconds:.0f} s, {len(outcome.requests)} bytes asked, answers {outcome.statuses}")
    return outcome


@pytest.mark.shows("exchange", "streams")
@names
def test_the_first_exchange_completes_and_is_streamed(gateway, name, tmp_path):
    gateway.answer()
    printed = []
    for at, question in enumerate(QUESTIONS):  # to one or the other a model of this size has nothing to say
        folder = tmp_path / str(at)
        folder.mkdir()
        outcome = ask(gateway, name, folder, question)
        assert outcome.code == 0, outcome.text
        assert set(outcome.statuses) == {200}
        assert re.search(rb'"stream": ?true', outcome.requests)
        assert b"content-type: text/event-stream" in outcome.responses.lower()
        is_long = outcome.responses.count(b"data: ") > 5  # of a single word it can't be told that it came in parts
        if is_long and gateway.shows_answer(outcome.out, outcome.responses):
            return
        printed.append(outcome.text)
    pytest.fail(f"it showed no answer: {printed}")


@pytest.mark.shows("bad key")
@names
def test_a_wrong_key_is_named(gateway, name, tmp_path):
    outcome = ask(gateway, name, tmp_path, key="sr_wrong", limit_s=120)
    assert set(outcome.statuses) == {401}
    assert outcome.code is not None, "it went on asking with the same key"
    assert re.search(r"401|[Aa]uthenticat|API key", outcome.text)


@pytest.mark.shows("unknown model")
@names
def test_an_unknown_model_is_named(gateway, name, tmp_path):
    outcome = ask(gateway, name, tmp_path, model="no-such-model", limit_s=120)
    assert set(outcome.statuses) == {404}
    assert outcome.code is not None
    assert "no-such-model" in outcome.text


@pytest.mark.shows("too long")
@names
def test_a_prompt_that_does_not_fit_is_named(gateway, name, tmp_path):
    outcome = ask(gateway, name, tmp_path, LONG, model=gateway.small, limit_s=120)
    assert set(outcome.statuses) == {400}
    assert outcome.code is not None
    # Claude Code, Codex and aider know the error by its code or words, and then say it in their own.
    assert re.search(
        f"context length is {gateway.small_len} tokens|rompt is too long|context window|token-limits", outcome.text
    )


@pytest.mark.shows("rate limit")
@names
def test_a_refusal_for_a_limit_is_waited_out(gateway, name, tmp_path):
    outcome = client_meets_a_limit(
        gateway, lambda: ask(gateway, name, tmp_path, key=gateway.throttled), tmp_path / "wire"
    )
    assert re.search(rb"(?i)retry-after: \d+\r\n", outcome.responses)
    assert outcome.code == 0, outcome.text
    assert gateway.shows_answer(outcome.out, outcome.responses), outcome.text
    assert {429, 200} <= set(outcome.statuses)


@pytest.mark.shows("tool call")
@pytest.mark.parametrize("name", list(TOOL_CALLS))
def test_a_tool_is_called_and_its_result_comes_back(scripted, name, tmp_path):
    gateway = scripted
    tool, arguments = TOOL_CALLS[name]
    gateway.answer(tool_call={"name": tool, "arguments": json.dumps(arguments)}, tool_call_times=1)
    outcome = ask(gateway, name, tmp_path)
    assert outcome.code == 0, outcome.text
    assert gateway.shows_answer(outcome.out, outcome.responses), outcome.text
    assert set(outcome.statuses) == {200}
    if name == "llm":  # its tool tells its version
        assert outcome.requests.count(b'"role":"tool"') == 1
    else:
        assert (tmp_path / "work" / MADE).read_text(encoding="utf-8") == "done\n"
