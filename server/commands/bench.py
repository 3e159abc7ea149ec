"""`strongroom bench`: run one of the benchmarks, each beside its baseline in the same run."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    import argparse

HELP = "Measure one part of Strongroom beside its baseline; arguments after the name go to the benchmark."
EPILOG = "Example: strongroom bench gateway --seconds 5 --json gateway.json"

BENCHMARKS = {
    "gateway": "benchmarks.gateway.overhead",
    "audit": "benchmarks.audit.append",
    "verify": "benchmarks.audit.verify",
    "policy": "benchmarks.policy.admission",
    "template": "benchmarks.template.render",
    "ttft": "benchmarks.template.ttft",
    "load": "benchmarks.sealed.load",
    "quantized": "benchmarks.sealed.quantized",
    "kernels": "benchmarks.kernels",
    "engine-client": "benchmarks.engine_client",
}
"""What is measured, to the module that measures it; docs/benchmarks.md says what each shows."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("arguments", nargs="...", help="passed on; '--help' lists them")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark as the program it is.

    Raises:
        ConfigError: The benchmarks are not installed beside the server.
    """
    module = BENCHMARKS[args.name]
    if importlib.util.find_spec("benchmarks") is None:
        raise ConfigError("The benchmarks are not installed here; run this in a clone of the repository.")
    sys.argv = [f"strongroom bench {args.name}", *args.arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    return 0
