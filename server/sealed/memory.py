"""How memory that holds plaintext weights and keys is treated: never dumped, never swapped, in large pages."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
from pathlib import Path
from typing import Final

from server.errors import StartError

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_MADV_HUGEPAGE: Final = 14
_MADV_NOHUGEPAGE: Final = 15
_MADV_POPULATE_WRITE: Final = 23
HUGE_PAGE_BYTES: Final = 2 << 20
_COREDUMP_FILTER: Final = Path("/proc/self/coredump_filter")
_SWAPS: Final = Path("/proc/swaps")
_MOUNTS: Final = Path("/proc/self/mountinfo")
_BLOCKS: Final = Path("/sys/class/block")


def forbid_core_dumps() -> None:
    """No core of this process, and no other process of the same user may read its memory (ptrace, /proc/PID/mem).

    Raises:
        StartError: The kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _libc().prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1:  # afterwards the file belongs to root
        # No mapping in a core, whoever writes one: what MADV_DONTDUMP does for a part, for the whole process.
        _COREDUMP_FILTER.write_text("0")
    # The limit alone does not bind a core_pattern that pipes to a program; not being dumpable does.
    if _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise StartError(f"The kernel refused PR_SET_DUMPABLE: {os.strerror(ctypes.get_errno())}.")


def forbid_swap(swaps: Path = _SWAPS) -> None:
    """Return if nothing of this process can reach a swap device: there is none, or its pages are locked.

    Raises:
        StartError: Swap is on and the pages can't be locked.
    """
    devices = _swap_devices(swaps)
    if not devices:
        return
    if _libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        raise StartError(
            f"Swap is on ({devices[0]}) and this process may not lock its memory "
            f"({os.strerror(ctypes.get_errno())}): plaintext could reach the disk. Turn swap off ('swapoff -a') "
            f"or allow locked memory (LimitMEMLOCK=infinity, 'ulimit -l unlimited')."
        )


def advise_huge_pages(address: int, num_bytes: int, *, wanted: bool = True) -> None:
    """Ask for large pages where memory is touched for the first time, or no longer ask for them.

    Only whole large pages inside the range are meant, so no more memory is used than without. A hint: a kernel that
    has no such pages, or none left, says so or gives small ones, and nothing is different but the time.
    """
    _advise(address, num_bytes, HUGE_PAGE_BYTES, _MADV_HUGEPAGE if wanted else _MADV_NOHUGEPAGE)


def populate(address: int, num_bytes: int) -> None:
    """Make the pages inside a range present and writable, as a first write to each would; what they hold stays.

    A hint as well: what it does not do is done when they are written to.
    """
    _advise(address, num_bytes, resource.getpagesize(), _MADV_POPULATE_WRITE)


def whole_pages(address: int, num_bytes: int, page_bytes: int) -> tuple[int, int]:
    """Return where the first whole page of a range begins and the last one ends: not behind it where there is none."""
    return -(-address // page_bytes) * page_bytes, (address + num_bytes) // page_bytes * page_bytes


def _advise(address: int, num_bytes: int, page_bytes: int, advice: int) -> None:
    first, end = whole_pages(address, num_bytes, page_bytes)
    if first < end:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


def is_memory_backed(path: Path, *, swaps: Path = _SWAPS, mounts: Path = _MOUNTS) -> bool:
    """Whether what is written to a folder stays in memory: ramfs, or tmpfs that can't be swapped to a disk."""
    kind, options = _filesystem_of(path, mounts)
    return kind == "ramfs" or (kind == "tmpfs" and ("noswap" in options or not _swap_devices(swaps)))


def is_tmpfs(path: Path) -> bool:
    """Whether a folder is on tmpfs or ramfs; without swap that is the same as `is_memory_backed`."""
    return _filesystem_of(path, _MOUNTS)[0] in ("tmpfs", "ramfs")


def _filesystem_of(path: Path, mounts: Path) -> tuple[str, list[str]]:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            kind, _, options = fields[fields.index("-") + 1 :][:3]
            return kind, options.split(",")
    return "unknown", []


def _swap_devices(swaps: Path, blocks: Path = _BLOCKS) -> list[str]:
    """Swap devices and files that keep what is written to them: not zram in memory, not what dm-crypt encrypts."""
    devices = [line.split()[0] for line in swaps.read_text().splitlines()[1:]]
    return [device for device in devices if not _forgets(blocks / Path(device).name)]


def _forgets(block: Path) -> bool:
    def told(name: str) -> str:
        try:
            return (block / name).read_text().strip()
        except OSError:
            return ""

    is_zram = block.name.startswith("zram") and told("backing_dev") in ("", "none")
    return (is_zram and block.is_dir()) or told("dm/uuid").startswith("CRYPT-")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
