"""First thing a child of the supervisor runs, then it becomes the real program: its death is tied to its parent's.

    python -I -S launch.py PARENT_PID COMMAND ARGUMENT…

The kernel keeps the tie across `exec`. A step of its own, and not `preexec_fn`, because that runs Python between fork
and exec in a parent that has threads. It imports nothing of this repository: a child starts in milliseconds.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie, limit, exec."""
    parent_pid = int(sys.argv[1])
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("launch: the kernel refused PR_SET_PDEATHSIG")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    try:
        os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - the whole point; the supervisor chose the command
    except OSError as err:
        sys.exit(f"launch: {sys.argv[2]}: {err.strerror}")


if __name__ == "__main__":
    main()
