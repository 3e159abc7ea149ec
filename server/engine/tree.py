"""A child and all processes it started: found, killed, reaped."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

TRACKER_GRACE_S = 2.0


async def kill_tree(process: subprocess.Popen[bytes], known: Mapping[int, int] | None = None) -> None:
    """Kill `process`, its session, and all that these started; reap what falls to us. Returns when none is left.

    Args:
        process: The child that led the tree; dead or alive.
        known: What `tree_members` said of the tree earlier: a process that left the session can't be found once its
            parent is dead.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + TRACKER_GRACE_S
    while members := tree_members(process.pid, known):
        for pid in members:
            if loop.time() < end_s and _is_resource_tracker(pid):
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.01)
        _reap(process, members)
    _reap(process, {})


def _is_resource_tracker(pid: int) -> bool:
    """Whether it is Python's own cleaner: it removes the shared memory of the dead, prompts in it, and then ends."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _reap(process: subprocess.Popen[bytes], members: Mapping[int, int]) -> None:
    process.poll()
    for pid in members:
        if pid != process.pid:
            with suppress(ChildProcessError):  # not ours: its own parent still lives, or has reaped it
                os.waitpid(pid, os.WNOHANG)


def tree_members(session_id: int, known: Mapping[int, int] | None = None) -> dict[int, int]:
    """Return the processes of a session, of `known`, and all their descendants, by pid with their start times.

    Of the zombies only those that this process must reap. The start time tells a process of `known` from a later one
    that got its number.
    """
    start_times: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    zombies: set[int] = set()
    pending = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue  # it ended while we looked
        # pid (comm) state ppid pgrp session … and the 22nd field; comm may hold spaces and brackets
        fields = stat[stat.rindex(")") + 2 :].split()
        pid, state, parent_pid, session = int(entry.name), fields[0], int(fields[1]), int(fields[3])
        start_times[pid] = int(fields[19])
        children.setdefault(parent_pid, []).append(pid)
        if state in "ZX" and parent_pid != os.getpid():
            zombies.add(pid)
        if session == session_id or (known and known.get(pid) == start_times[pid]):
            pending.append(pid)
    members = set(pending)
    while pending:
        for child in children.get(pending.pop(), ()):
            if child not in members:
                members.add(child)
                pending.append(child)
    return {pid: start_times[pid] for pid in members - zombies}
