"""SDKs and libraries in Python and Node: the same capabilities as the agents', by their own functions and classes.

Before vLLM the tool is a forced one, for no small model calls a tool when it should.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.catalogue import FOLDER, VENVS, Target, environment
from tests.clients.drive import ROOT, Outcome, run_offline
from tests.clients.gateways import client_meets_a_limit

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients.gateways import Gateway

pytestmark = pytest.mark.clients

NODE = [shutil.which("node") or "node", str(ROOT / "tests" / "node" / "library.mjs")]


def python(interpreter: str) -> list[str]:
    """The Python script, in the environment of the library."""
    return [interpreter, str(FOLDER / "libraries" / "python.py")]


LIBRARIES = {
    "openai (Python)": [*python(sys.executable), "openai"],
    "anthropic (Python)": [*python(sys.executable), "anthropic"],
    "openai (Node)": [*NODE, "openai"],
    "anthropic (Node)": [*NODE, "anthropic"],
    "AI SDK": [*NODE, "ai"],
    "LangChain": [*python(str(VENVS / "openai3" / "bin" / "python")), "langchain"],
    "LiteLLM": [*python(str(VENVS / "litellm" / "bin" / "python")), "litellm"],
    "LiteLLM, anthropic/": [*python(str(VENVS / "litellm" / "bin" / "python")), "litellm-anthropic"],
}
# The class that each raises, by the status of the answer.
RAISED = {
    401: {"AuthenticationError", "AI_APICallError", "APICallError"},
    404: {"NotFoundError", "AI_APICallError", "APICallError"},
    400: {"BadRequestError", "AI_APICallError", "APICallError"},
}
names = pytest.mark.parametrize("name", list(LIBRARIES))


def ask(gateway: Gateway, name: str, folder: Path, what: str, **changed: str) -> tuple[Outcome, dict[str, Any]]:
    told = {"base": gateway.base, "key": gateway.key, "model": gateway.model} | changed
    target = Target(**told, home=folder / "home", work=folder / "work")
    target.home.mkdir()
    target.work.mkdir()
    command = [*LIBRARIES[name], target.base, target.key, target.model, what]
    env = environment(target) | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    outcome = run_offline(command, env, target.base, target.work, 90)
    assert outcome.code == 0, outcome.text
    saw: dict[str, Any] = json.loads(outcome.out.strip().splitlines()[-1])
    return outcome, saw


@pytest.mark.shows("exchange")
@names
def test_an_answer_comes_back(gateway, name, tmp_path):
    gateway.answer()
    _, saw = ask(gateway, name, tmp_path, "plain")
    assert gateway.is_answer(saw["text"])


@pytest.mark.shows("streams")
@names
def test_an_answer_is_streamed(gateway, name, tmp_path):
    gateway.answer(delay_ms=50)
    _, saw = ask(gateway, name, tmp_path, "stream")
    assert gateway.is_answer(saw["text"])
    assert saw["pieces"] > 1


@pytest.mark.shows("bad key")
@names
def test_a_wrong_key_raises_its_class(gateway, name, tmp_path):
    outcome, saw = ask(gateway, name, tmp_path, "plain", key="sr_wrong")
    assert outcome.statuses == [401]
    assert saw["status"] == 401
    assert RAISED[401].intersection(saw["error"])
    assert "API key" in saw["message"]


@pytest.mark.shows("unknown model")
@names
def test_an_unknown_model_raises_its_class(gateway, name, tmp_path):
    outcome, saw = ask(gateway, name, tmp_path, "plain", model="no-such-model")
    assert outcome.statuses == [404]
    assert saw["status"] == 404
    assert RAISED[404].intersection(saw["error"])
    assert "no-such-model" in saw["message"]


@pytest.mark.shows("too long")
@names
def test_a_prompt_that_does_not_fit_raises_its_class(gateway, name, tmp_path):
    outcome, saw = ask(gateway, name, tmp_path, "long", model=gateway.small)
    assert outcome.statuses == [400]
    assert saw["status"] == 400
    assert RAISED[400].intersection(saw["error"])
    assert f"maximum context length is {gateway.small_len} tokens" in saw["message"]
    if name.startswith("LiteLLM"):
        assert "ContextWindowExceededError" in saw["error"]
    if name == "LangChain":
        assert "ContextOverflowError" in saw["error"] or "OpenAIContextOverflowError" in saw["error"]


@pytest.mark.shows("rate limit")
@names
def test_a_refusal_for_a_limit_is_waited_out(gateway, name, tmp_path):
    outcome, saw = client_meets_a_limit(
        gateway, lambda: ask(gateway, name, tmp_path, "limit", key=gateway.throttled), tmp_path / "wire"
    )
    if name == "LiteLLM, anthropic/":  # this route of it leaves trying again to its caller
        assert saw["status"] == 429
        assert "RateLimitError" in saw["error"]
        return
    assert gateway.is_answer(saw["text"])
    assert {429, 200} <= set(outcome.statuses)


@pytest.mark.shows("tool call")
@names
def test_a_tool_call_has_its_shape(gateway, name, tmp_path):
    gateway.answer(tool_call={"name": "look_up", "arguments": '{"q": "pong"}'}, tool_call_times=1)
    _, saw = ask(gateway, name, tmp_path, gateway.tool)
    assert saw["tool"] == "look_up"
    assert set(saw["arguments"]) == {"q"}
    assert isinstance(saw["arguments"]["q"], str)
