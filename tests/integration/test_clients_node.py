"""The Node SDKs, driven for real: openai, anthropic and the AI SDK."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL

SCRIPT = Path(__file__).resolve().parents[1] / "node" / "sdks.mjs"


@pytest.fixture(scope="module")
def seen(gateway, key):
    if not (SCRIPT.parent / "node_modules" / "openai").is_dir():
        pytest.fail("The Node SDKs are not installed: run 'npm ci' in tests/node, or 'make setup'.")
    gateway.control(num_tokens=8)
    done = subprocess.run(
        ["node", str(SCRIPT), gateway.base, key, MODEL, EMBEDDER],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "what",
    [
        "openai_stream_equals_plain",
        "openai_usage",
        "openai_embedding",
        "openai_responses",
        "anthropic_stream_equals_plain",
        "ai_generate",
        "ai_stream",
        "ai_usage",
    ],
)
def test_exchanges(seen, what):
    assert seen[what] is True


def test_error_classes(seen):
    assert seen["openai_errors"] == {
        "key": ["AuthenticationError", 401, "invalid_api_key", "string"],
        "model": ["NotFoundError", 404, "model_not_found", "string"],
        "long": ["BadRequestError", 400, "context_length_exceeded", "string"],
    }
    assert seen["anthropic_error"] == ["NotFoundError", 404, "not_found_error"]
