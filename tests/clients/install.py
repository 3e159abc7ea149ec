"""Install the clients that `make test-clients` drives, from locked lists, each set into an environment of its own.

    python -m tests.clients.install

Python clients pin other versions of the same libraries (openai 1, 2 and 3), so each list has its own environment below
`tests/clients/.venvs`. Scripts of npm packages are not run. A run that finds everything in place does nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
STAMP = ".strongroom-setup"


def in_place(stamp: Path, digest: str) -> bool:
    """Whether what `stamp` stands for was installed from the same list."""
    return stamp.exists() and stamp.read_text(encoding="utf-8") == digest


def install_python(lock: Path) -> None:
    """Install one locked list into its environment."""
    venv = FOLDER / ".venvs" / lock.stem
    digest = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()
    if in_place(venv / STAMP, digest):
        return
    print(f"installing the clients of {lock.name}", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "-r", str(lock)], check=True)
    (venv / STAMP).write_text(digest, encoding="utf-8")


def install_node(folder: Path) -> None:
    """Install one locked set of npm packages."""
    digest = hashlib.sha256((folder / "package-lock.json").read_bytes()).hexdigest()
    if in_place(folder / "node_modules" / STAMP, digest):
        return
    print("installing the agents from npm (1.6 GB)", flush=True)
    # Not `npm ci`: it wants builds for every platform in the list, and a registry may serve those of one only. What the
    # list names is held to its hashes all the same, and `--no-save` leaves the list alone.
    command = ["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "node_modules" / STAMP).write_text(digest, encoding="utf-8")


if __name__ == "__main__":
    for path in sorted((FOLDER / "python").glob("*.txt")):
        install_python(path)
    install_node(FOLDER / "node")
