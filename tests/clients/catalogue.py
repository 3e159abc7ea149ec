"""The command-line clients: how each is pointed at a gateway and asked one question, headless."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).resolve().parent
VENVS = FOLDER / ".venvs"
NODE = FOLDER / "node" / "node_modules"
NODE_BIN = NODE / ".bin"
# Two clients come as programs of the machine in packages of their own, which a script of npm's would put into place; we
# run none.
MACHINE = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(platform.machine(), platform.machine())


@dataclass(frozen=True)
class Target:
    """What a client is told: the gateway, a key, a model; and where it may write."""

    base: str
    key: str
    model: str
    home: Path
    work: Path

    def write(self, name: str, content: str) -> Path:
        """Put a file of settings below the client's home."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path


@dataclass(frozen=True)
class Client:
    """One client, and the package it comes in. `build` writes its settings and returns how to ask `prompt`."""

    name: str
    program: Path
    build: Callable[[Target, str], tuple[list[str], dict[str, str]]]
    package: str


def build_llm(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """`llm`, with tools of its own switched on."""
    target.write(
        "llm/extra-openai-models.yaml",
        f"- model_id: strongroom\n  model_name: {target.model}\n  api_base: {target.base}/v1\n"
        "  api_key_name: strongroom\n  supports_tools: true\n",
    )
    target.write("llm/keys.json", json.dumps({"strongroom": target.key}))
    return ["-m", "strongroom", "-T", "llm_version", prompt], {"LLM_USER_PATH": str(target.home / "llm")}


def build_aider(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """Aider, one message, no repository."""
    options = "--yes-always --no-git --no-check-update --analytics-disable --no-show-model-warnings --no-pretty"
    options += " --no-show-release-notes --no-detect-urls --map-tokens 0"
    return [
        "--model", f"openai/{target.model}", "--openai-api-base", f"{target.base}/v1",
        "--openai-api-key", target.key, *options.split(), "--message", prompt,
    ], {}  # fmt: skip


def build_codex(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """Codex CLI, `exec`."""
    target.write(
        ".codex/config.toml",
        f'model = "{target.model}"\nmodel_provider = "strongroom"\n'
        '[model_providers.strongroom]\nname = "Strongroom"\n'
        f'base_url = "{target.base}/v1"\nenv_key = "OPENAI_API_KEY"\nwire_api = "responses"\n'
        "[analytics]\nenabled = false\n",
    )
    env = {"CODEX_HOME": str(target.home / ".codex"), "OPENAI_API_KEY": target.key}
    # Its own sandbox wants namespaces that this one may not have; the client is in ours already.
    return ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json", prompt], env


def build_claude(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """Claude Code, `-p`."""
    env = {
        "ANTHROPIC_BASE_URL": target.base,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ANTHROPIC_MODEL": target.model,
        "ANTHROPIC_SMALL_FAST_MODEL": target.model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",  # else it refuses to skip permissions as root
    }
    return ["-p", prompt, "--output-format", "stream-json", "--verbose", "--dangerously-skip-permissions"], env


def build_opencode(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """`opencode run`."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{target.base}/v1", "apiKey": "{env:OPENAI_API_KEY}"},
        "models": {target.model: {}},
    }
    config = {"share": "disabled", "autoupdate": False, "provider": {"strongroom": provider}}
    path = target.write("opencode.json", json.dumps(config))
    env = {
        "OPENCODE_CONFIG": str(path),
        "OPENAI_API_KEY": target.key,
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    }
    return ["run", "--format", "json", "-m", f"strongroom/{target.model}", prompt], env


def build_qwen(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """qwen-code, one shot."""
    target.write(".qwen/settings.json", json.dumps({"privacy": {"usageStatisticsEnabled": False}}))
    env = {"OPENAI_API_KEY": target.key, "OPENAI_BASE_URL": f"{target.base}/v1", "OPENAI_MODEL": target.model}
    return ["--auth-type", "openai", "--yolo", "-p", prompt], env


def build_cn(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """Continue's command line."""
    path = target.write(
        "continue.yaml",
        "name: Strongroom\nversion: 1.0.0\nschema: v1\nmodels:\n"
        f"  - name: strongroom\n    provider: openai\n    model: {target.model}\n"
        f"    apiBase: {target.base}/v1\n    apiKey: {target.key}\n    roles: [chat]\n",
    )
    env = {"CONTINUE_TELEMETRY_ENABLED": "0", "CONTINUE_METRICS_ENABLED": "0", "CONTINUE_CLI_ENABLE_TELEMETRY": "0"}
    return ["--config", str(path), "--auto", "-p", prompt], env


def build_cline(target: Target, prompt: str) -> tuple[list[str], dict[str, str]]:
    """Cline's command line; the file is what `cline auth` writes."""
    settings = {"provider": "openai-compatible", "apiKey": target.key, "model": target.model}
    entry = {"settings": {**settings, "baseUrl": f"{target.base}/v1"}, "tokenSource": "manual"}
    entry["updatedAt"] = "2026-01-01T00:00:00.000Z"
    providers = {"version": 1, "lastUsedProvider": "openai-compatible", "modes": {}}
    content = json.dumps({**providers, "providers": {"openai-compatible": entry}})
    target.write(".cline/data/settings/providers.json", content)
    return ["--json", "-P", "openai-compatible", prompt], {"CLINE_TELEMETRY_DISABLED": "1"}


CLIENTS = {
    client.name: client
    for client in (
        Client("llm", VENVS / "openai3" / "bin" / "llm", build_llm, "llm"),
        Client("aider", VENVS / "aider" / "bin" / "aider", build_aider, "aider-chat"),
        Client("codex", NODE_BIN / "codex", build_codex, "@openai/codex"),
        Client(
            "claude",
            NODE / "@anthropic-ai" / f"claude-code-{MACHINE}" / "claude",
            build_claude,
            "@anthropic-ai/claude-code",
        ),
        Client("opencode", NODE / f"opencode-{MACHINE}" / "bin" / "opencode", build_opencode, "opencode-ai"),
        Client("qwen", NODE_BIN / "qwen", build_qwen, "@qwen-code/qwen-code"),
        Client("cn", NODE_BIN / "cn", build_cn, "@continuedev/cli"),
        Client("cline", NODE_BIN / "cline", build_cline, "cline"),
    )
}


def environment(target: Target) -> dict[str, str]:
    """Everything a client sees of the environment, before its own variables."""
    home = str(target.home)
    env = {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", "TERM": "dumb", "NO_COLOR": "1", "CI": "1"}
    env |= {f"XDG_{name}_HOME": f"{home}/{name.lower()}" for name in ("CONFIG", "DATA", "CACHE", "STATE")}
    return env | {"DO_NOT_TRACK": "1", "TMPDIR": home, "TIKTOKEN_CACHE_DIR": home}


def locked_versions() -> dict[str, str]:
    """The version of each client that is installed, by the client's name."""
    node = json.loads((FOLDER / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    lists = sorted((FOLDER / "python").glob("*.in"))
    pins = [line.split("==") for path in lists for line in path.read_text(encoding="utf-8").split()]
    packages: dict[str, str] = {**node, **dict(pins)}
    named = {client.name: packages[client.package] for client in CLIENTS.values()}
    main = json.loads((FOLDER.parent / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    libraries = {
        "openai (Python)": version("openai"),
        "anthropic (Python)": version("anthropic"),
        "openai (Node)": main["openai"],
        "anthropic (Node)": main["@anthropic-ai/sdk"],
        "AI SDK": main["ai"],
        "LangChain": packages["langchain-openai"],
        "LiteLLM": packages["litellm"],
        "LiteLLM, anthropic/": packages["litellm"],
    }
    return {**packages, **named, **libraries}
