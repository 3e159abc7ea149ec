"""`strongroom bench`: run one of the benchmarks, each beside its baseline in the same run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from typing_extensions import override

from server.errors import ConfigError

if TYPE_CHECKING:
    import argparse

HELP = "Measure one part of Strongroom beside its baseline; arguments after the name go to the benchmark."
EPILOG = "Example: strongroom bench gateway --seconds 5 --json gateway.json"

BENCHMARKS = {
    "serve": "benchmarks.serving.serve",
    "compare": "benchmarks.compare",
    "report": "benchmarks.report",
    "sweep": "benchmarks.serving.sweep",
    "engine-pairs": "benchmarks.serving.engine_pairs",
    "flood": "benchmarks.serving.flood",
    "soak": "benchmarks.gateway.soak",
    "idle": "benchmarks.gateway.idle",
    "gateway": "benchmarks.gateway.overhead",
    "dialects": "benchmarks.gateway.dialects",
    "controls": "benchmarks.gateway.controls",
    "guard": "benchmarks.guard.latency",
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
    parser.add_argument(
        "--result", type=Path, metavar="FILE", help="write what is printed as a result that 'bench compare' reads"
    )
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
    importlib.import_module("benchmarks.orderly").end_orderly()
    printed = _Copy(sys.stdout)
    with contextlib.redirect_stdout(printed) if args.result else contextlib.nullcontext():
        code = _run(module)
    if args.result and code == 0:
        result = importlib.import_module("benchmarks.result")
        rows = importlib.import_module("benchmarks.rows")
        try:
            found = rows.result_of(args.name, args.arguments, printed.text)
        except ValueError as err:
            raise ConfigError(f"No result was written: {err}") from err
        result.write_result(result.finish(found), args.result)
    return code


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    return 0


class _Copy(io.TextIOBase):
    """Hands on what is written, and keeps it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._parts: list[str] = []

    @override
    def write(self, text: str, /) -> int:
        self._parts.append(text)
        return self._stream.write(text)

    @override
    def flush(self) -> None:
        self._stream.flush()

    @property
    def text(self) -> str:
        return "".join(self._parts)
