"""`strongroom openapi`: the public routes as an OpenAPI description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from server.api.openapi import describe

if TYPE_CHECKING:
    import argparse

HELP: str = "print the OpenAPI description of the public routes"
EPILOG: str = "example: strongroom openapi --out docs/openapi.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `openapi`."""
    parser.add_argument("--out", type=Path, help="write it to this file")


def run(args: argparse.Namespace) -> int:
    """Print or write it."""
    text = json.dumps(describe(), indent=2, ensure_ascii=False) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")
    return 0
