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


@pytest.fixture(scope="session")
def static_counts() -> dict[tuple[str, str], dict[str, Any]]:
    """Kernel and target to its counts, as `python -m serving_kernels.aot` prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "serving_kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {(counts["kernel"], counts["target"]): counts for counts in json.loads(done.stdout)}
