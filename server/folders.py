"""Folders that only this user may enter, and which of them holds the sockets of a state folder."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from server.errors import ConfigError

PRIVATE_MODE = 0o700
MAX_RUN_DIR_BYTES = 59
"""Longest folder below which every socket's path fits the kernel's 107 bytes: ours, and vLLM's `e-XXXXXXXX/<uuid>`."""


def make_private_dir(path: Path) -> None:
    """Make a folder that only this user may enter, or make sure that it is one.

    Raises:
        ConfigError: Something else stands there: a link, another user's folder.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=PRIVATE_MODE, parents=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise ConfigError(f"{path} must be a folder that belongs to this user. Remove it and start again.")
    if stat.S_IMODE(info.st_mode) != PRIVATE_MODE:
        path.chmod(PRIVATE_MODE)


def runtime_dir(state: Path) -> Path:
    """Return the folder for sockets: `STATE/run`, or, where its path is too long for a socket's, a short one.

    The short one has a name that follows from the state folder's, so that every process finds it; whoever makes it must
    use `make_private_dir`, which refuses a folder that somebody else put there.
    """
    run = state.absolute() / "run"
    if len(os.fsencode(run)) <= MAX_RUN_DIR_BYTES:
        return run
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")  # noqa: S108 - see above: made and checked as private
    return base / f"strongroom-{os.getuid()}-{hashlib.sha256(os.fsencode(run)).hexdigest()[:12]}"


def make_runtime_dir(state: Path) -> Path:
    """Return the folder for sockets, made private.

    Raises:
        ConfigError: Something else stands there.
    """
    path = runtime_dir(state)
    make_private_dir(path)
    return path
