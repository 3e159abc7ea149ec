"""Keep plaintext weights and keys out of core dumps and swap."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Final

from server.errors import StartError

_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4


def forbid_core_dumps() -> None:
    """No core of this process, and no other process of the same user may read its memory (ptrace, /proc/PID/mem).

    Raises:
        StartError: The kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit alone does not bind a core_pattern that pipes to a program; not being dumpable does.
    if _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise StartError(f"The kernel refused PR_SET_DUMPABLE: {os.strerror(ctypes.get_errno())}.")


def forbid_swap(swaps: Path = Path("/proc/swaps")) -> None:
    """Return if nothing of this process can reach a swap device: there is none, or its pages are locked.

    Raises:
        StartError: Swap is on and the pages can't be locked.
    """
    devices = swaps.read_text().splitlines()[1:]
    if not devices:
        return
    if _libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        raise StartError(
            f"Swap is on ({devices[0].split()[0]}) and this process may not lock its memory "
            f"({os.strerror(ctypes.get_errno())}): plaintext could reach the disk. Turn swap off ('swapoff -a') "
            f"or allow locked memory (LimitMEMLOCK=infinity, 'ulimit -l unlimited')."
        )


def is_memory_backed(path: Path) -> bool:
    """Whether a folder is on tmpfs or ramfs, and so never written to a disk."""
    return _filesystem_of(path) in ("tmpfs", "ramfs")


def _filesystem_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
