"""`strongroom serve`: run the audit writer, the gateway and the engines of a configuration."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.host import Host
from server.obs.logging import setup_logging
from server.settings import load_settings

if TYPE_CHECKING:
    import argparse

    from server.settings import Settings

HELP = "Serve the models of a configuration until Ctrl-C or SIGTERM."
EPILOG = "Example: strongroom serve --config configs/strongroom.yaml --port 8000 --state ./.strongroom"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--config", type=Path, required=True, help="the configuration, YAML")
    parser.add_argument("--host", help="address of the public listener; wins over the configuration")
    parser.add_argument("--port", type=int, help="port of the public listener; wins over the configuration")
    parser.add_argument("--admin-port", type=int, help="port of the admin listener (default: the public port plus one)")
    parser.add_argument("--state", type=Path, help="the state folder; wins over the configuration")
    parser.add_argument(
        "--prepare-embedded",
        action="store_true",
        help="seal the embedded model, and make keys and client.env, where they are missing",
    )


def run(args: argparse.Namespace) -> int:
    """Serve; return 0 after an asked-for stop."""
    overrides: dict[str, Any] = {}
    if args.host is not None:
        overrides["public.host"] = args.host
    if args.port is not None:
        overrides["public.port"] = args.port
        overrides["admin.port"] = args.port + 1
    if args.admin_port is not None:
        overrides["admin.port"] = args.admin_port
    if args.state is not None:
        overrides["state"] = str(args.state)
    settings = load_settings(args.config, overrides)
    setup_logging("warning")
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"strongroom: {line}", file=sys.stderr, flush=True)

    host = Host(settings, say)
    return asyncio.run(
        host.run(
            embedded=args.prepare_embedded,
            banner=lambda: print(banner(settings, time.monotonic() - started_s), flush=True),
        )
    )


def banner(settings: Settings, seconds: float) -> str:
    """Return what a newcomer needs next: one curl line, and how to point clients here."""
    state = settings.state
    base = f"http://{settings.public.host}:{settings.public.port}/v1"
    model = next((model.id for model in settings.models if model.engine.runner == "generate"), "MODEL")
    later = [model.id for model in settings.models if model.optional]
    question = "Write a Python function that reads a CSV file."
    return "\n".join(
        (
            "",
            f"Strongroom is ready after {seconds:.0f} s.",
            *([f"Still starting: {', '.join(later)} (503 until then)."] if later else []),
            "",
            "Try it:",
            f'  . {state}/client.env && curl -sN "$OPENAI_BASE_URL/chat/completions" \\',
            "    -H \"Authorization: Bearer $OPENAI_API_KEY\" -H 'Content-Type: application/json' \\",
            '    -d \'{"model":"\'"$MODEL"\'","stream":true,"messages":[{"role":"user","content":"'
            + question
            + "\"}]}'",
            "",
            f"openai SDK: '. {state}/client.env' sets what it reads from the environment; then",
            "  openai.OpenAI().chat.completions.create(model=os.environ['MODEL'], messages=[...])",
            "",
            "Continue, in its config.yaml:",
            "  models:",
            f"    - {{name: Strongroom, provider: openai, model: {model}, apiBase: {base},",
            "       apiKey: the OPENAI_API_KEY of client.env}",
            "",
            f"Metrics and admin API: . {state}/admin.env. Stop with Ctrl-C.",
        )
    )
