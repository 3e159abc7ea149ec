"""`strongroom tune`: try engine settings on this machine, and write a profile that keeps what helped."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    import argparse

HELP = "Try a few engine settings on this machine and write a profile that keeps what helped, with the evidence."
EPILOG = "Example: strongroom tune --config configs/strongroom.yaml --out tuned.yaml --try speculative_ngram=4,8"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, where the benchmarks are installed beside the server."""
    if importlib.util.find_spec("benchmarks") is not None:
        importlib.import_module("benchmarks.serving.tune").configure(parser)


def run(args: argparse.Namespace) -> int:
    """Tune.

    Raises:
        ConfigError: The benchmarks are not installed, or what is asked for is wrong.
    """
    if importlib.util.find_spec("benchmarks") is None:
        raise ConfigError("The benchmarks are not installed here; run this in a clone of the repository.")
    code: int = importlib.import_module("benchmarks.serving.tune").run(args)
    return code
