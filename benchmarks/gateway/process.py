"""What a process holds: memory and file descriptors, it and its children together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """Of one process and everything below it."""

    memory_bytes: int
    num_fds: int

    def __add__(self, other: Held) -> Held:
        return Held(self.memory_bytes + other.memory_bytes, self.num_fds + other.num_fds)


def held(pid: int) -> Held:
    """Private and shared memory in proportion (PSS), and open descriptors; nothing for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        num_fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return Held(0, 0)
    pss = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return Held(pss, num_fds)


def cpu_s(pid: int) -> float:
    """Processor time that a process has taken, with all its threads; other work on the machine hardly changes it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Processes below this one, at any depth."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def held_by_tree(pid: int) -> Held:
    """Of a process and everything below it."""
    total = held(pid)
    for child in children(pid):
        total += held(child)
    return total
