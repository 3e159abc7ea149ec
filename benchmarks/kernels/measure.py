"""Time a case and its baselines on the device that is here, in one session, with what is needed to repeat it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.kernels.cases import Case, Run

# Returns the 20th, 50th and 80th percentile in milliseconds.
Timer = Callable[[Run], tuple[float, float, float]]
_PACKAGES = ("torch", "triton", "bitsandbytes", "vllm")


def device_timer(run: Run) -> tuple[float, float, float]:
    """Warm up, then time on the device with its cache flushed between runs."""
    from triton.testing import do_bench

    low, middle, high = do_bench(run, quantiles=[0.2, 0.5, 0.8])
    return low, middle, high


def measure(case: Case, timer: Timer = device_timer) -> list[dict[str, Any]]:
    """Return one row for the kernel and one for each baseline; the kernel runs first and last to show drift."""
    contenders = {"kernel": (case.run, case.num_bytes), **case.baselines, "kernel, again": (case.run, case.num_bytes)}
    rows = []
    for name, (run, num_bytes) in contenders.items():
        low, middle, high = timer(run)
        rows.append(
            {
                "kernel": case.name,
                "contender": name,
                "shape": case.shape,
                "dtype": case.dtype,
                "p20_ms": low,
                "p50_ms": middle,
                "p80_ms": high,
                "bytes_moved": num_bytes,
                "gb_s": num_bytes / middle / 1e6,
            }
        )
    return rows


def environment() -> dict[str, Any]:
    """Return device, driver, versions, commit and date."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _first_line("git", "rev-parse", "HEAD")
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0] if done.stdout else None
