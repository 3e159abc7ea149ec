"""What a process gives up before it holds anything worth stealing; Linux system calls, no libraries."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when the thread that started it ends.

    Args:
        parent_pid: Who the parent should be; if it is gone already, so is this process.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:  # it died before the kernel knew our wish
        os.kill(os.getpid(), signal.SIGKILL)


def become_subreaper() -> None:
    """Have orphaned grandchildren handed to this process, so that it can wait until they are gone."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_dumps() -> None:
    """No core file, and no reading of this process's memory by others of the same user.

    The first is inherited, the second is lost at `exec`: each process of the engine calls this for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def harden_spawned_process() -> None:
    """What each process that vLLM spawns does first: no dumps, and no life after its parent's."""
    forbid_dumps()
    parent = multiprocessing.parent_process()
    die_with_parent(parent.pid if parent is not None else None)


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """What isolation was reached: `namespace`, `user-namespace` or `none`, with the reason for the last."""

    achieved: str
    reason: str = ""


def isolate_network(mode: str) -> NetworkReport:
    """Move this process into a network namespace with nothing but loopback; single-threaded callers only.

    Args:
        mode: `require` fails where it can't be done, `auto` goes on and reports, `off` does nothing.

    Raises:
        ConfigError: `require`, and the kernel refuses.
    """
    if mode == "off":
        return NetworkReport("none", "switched off")
    try:
        _try_in_a_child()
        achieved = _unshare_network()
        _raise_loopback()
    except OSError as err:
        reason = f"the kernel refused: {err.strerror}"
        if mode == "require":
            raise ConfigError(
                f"The engine can't be cut off from the network ({reason}), and network_isolation is 'require'. "
                "Permit user namespaces, start with CAP_SYS_ADMIN, or set it to 'auto'."
            ) from err
        return NetworkReport("none", reason)
    return NetworkReport(achieved)


def _try_in_a_child() -> None:
    """Go through it in a process of no consequence first.

    Some kernels permit the first step and refuse the next one; a process left without loopback or ids could not serve.
    """
    child = os.fork()
    if child == 0:
        number = 0
        try:
            _unshare_network()
            _raise_loopback()
        except OSError as err:
            number = err.errno or errno.EPERM
        finally:
            os._exit(number)
    _, status = os.waitpid(child, 0)
    if number := os.waitstatus_to_exitcode(status):
        raise OSError(abs(number), os.strerror(abs(number)))


def _unshare_network() -> str:
    uid, gid = os.getuid(), os.getgid()
    try:
        _unshare(_CLONE_NEWNET)
    except PermissionError:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        # The same ids inside as outside: files stay ours. Without `deny` an unprivileged process may not map a group.
        Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="utf-8")
        return "user-namespace"
    return "namespace"


def _unshare(flags: int) -> None:
    if _libc().unshare(flags) != 0:
        number = ctypes.get_errno()
        # Some container runtimes answer ENOSYS or EINVAL where they mean "not permitted".
        kind = PermissionError if number in {errno.EPERM, errno.EACCES, errno.ENOSYS} else OSError
        raise kind(number, os.strerror(number))


def _raise_loopback() -> None:
    """Gloo, which vLLM's worker uses even alone, needs 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
