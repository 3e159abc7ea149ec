"""Static counts of every kernel, compiled once a session in a process that does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


Counts = dict[tuple[str, str], dict[str, Any]]


def compiled(*arguments: str) -> Counts:
    """Kernel and target to its counts, as `python -m serving_kernels.aot` prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "serving_kernels.aot", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {(counts["kernel"], counts["target"]): counts for counts in json.loads(done.stdout)}


@pytest.fixture(scope="session")
def static_counts() -> Counts:
    """Every kernel in its usual shape, for every target."""
    return compiled()


@pytest.fixture(scope="session")
def variant_counts() -> Counts:
    """Every other shape that a device launches, for one target."""
    return compiled("--variants", "--targets", "90")


@pytest.fixture(scope="session")
def all_variant_counts() -> Counts:
    """The same for the other targets."""
    return compiled("--variants", "--targets", "80", "100")
