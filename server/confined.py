"""Runs somebody else's program with little: no network, bounded memory, time and files, no life after its parent.

    python -m server.confined MEMORY_BYTES CPU_S PARENT_PID PROGRAM [ARGUMENT…]

The program gets the environment it was started with, without what made this module importable. Where the kernel refuses
a part of it, nothing is run: the exit code is 70, which tells the caller that there is no result.
"""

from __future__ import annotations

import os
import resource
import sys

from server.engine.isolation import die_with_parent, isolate_network
from server.errors import ConfigError

EXIT_REFUSED = 70
_MAX_FILE_BYTES = 64 * 1024 * 1024


def main(arguments: list[str]) -> int:
    """Give up what the program must not have, and become it."""
    memory_bytes, cpu_s, parent_pid = (int(one) for one in arguments[:3])
    program = arguments[3:]
    try:
        die_with_parent(parent_pid)
        isolate_network("require")
        # Of data, not of address space: the run time of some languages reserves more than there is and never uses it.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold a customer's code
        os.execve(program[0], program, {k: v for k, v in os.environ.items() if k != "PYTHONPATH"})  # noqa: S606 - no shell is the point
    except (ConfigError, OSError, ValueError):
        return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
