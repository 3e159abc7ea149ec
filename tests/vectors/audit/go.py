"""Builds the independent checkers with Go's own checksum-database libraries, once a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

INSTALL = "apt-get install --no-install-recommends golang-go golang-golang-x-mod-dev"
LIBRARIES = Path("/usr/share/gocode")


@cache
def build_go(name: str) -> Path:
    """Return the built program; where Go or its libraries are missing, fail with the command that installs them."""
    if shutil.which("go") is None or not (LIBRARIES / "src/golang.org/x/mod/sumdb").is_dir():
        raise AssertionError(f"The independent verifier needs Go and its checksum-database libraries; run: {INSTALL}")
    folder = Path(tempfile.gettempdir()) / f"strongroom-go-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / f"{name}-{os.getpid()}"
    source = Path(__file__).parent / name / "main.go"
    environment = {
        **os.environ,
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOPATH": str(LIBRARIES),
        "GOCACHE": str(folder / "cache"),
    }
    subprocess.run(["go", "build", "-o", str(program), str(source)], env=environment, check=True, cwd=source.parent)
    return program
