"""The set-ups of docs/clients.md parse, and name routes and a model that there are."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from server.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
NAMED = [
    "openai SDK", "anthropic SDK", "AI SDK", "LangChain", "LiteLLM", "`llm`", "aider", "Codex CLI", "Claude Code",
    "opencode", "qwen-code", "Continue", "Cline", "Zed", "VS Code", "Tabby", "minuet", "llama.vscode", "Open WebUI",
]  # fmt: skip


def parse(language: str, text: str) -> None:
    """Raise where the text is not of its language."""
    match language:
        case "python":
            ast.parse(text)
        case "yaml":
            assert yaml.safe_load(text)
        case "toml":
            assert tomllib.loads(text)
        case "json":
            assert json.loads(text)
        case "sh":
            subprocess.run(["sh", "-n"], input=text, text=True, check=True)
        case "js":
            subprocess.run(["node", "--check", "--input-type=module", "-"], input=text, text=True, check=True)
        case "lua":  # no parser here: quotes and braces must close
            bare = re.sub(r'"[^"\n]*"', "", text)
            assert '"' not in bare
            assert bare.count("{") == bare.count("}")
            assert bare.count("(") == bare.count(")")
        case _:
            pytest.fail(f"a set-up in {language} is not tested")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_set_up_parses_and_names_what_there_is(number):
    language, text = BLOCKS[number]
    parse(language, text)
    routes = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))["paths"]
    for url in re.findall(r"http://[^\s\"',]+", text):
        parts = urlsplit(url)
        assert parts.netloc == "127.0.0.1:8000"
        assert parts.path in {"", "/v1"} or parts.path in routes
    settings = load_settings(ROOT / "configs" / "strongroom.yaml", {})
    known = {name for model in settings.models for name in (model.id, *model.aliases)}
    for name in re.findall(r"smollm[\w.-]*", text):
        assert name in known


def test_every_client_has_a_set_up():
    setups = TEXT.split("## Set-ups")[1].split("## Errors")[0]
    assert [name for name in NAMED if not re.search(rf"^{re.escape(name)}", setups, flags=re.MULTILINE)] == []
