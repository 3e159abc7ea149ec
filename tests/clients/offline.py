"""Run a client where it reaches the gateway and nothing else, and write down what passed between the two.

    python -m tests.clients.offline PORT FOLDER -- COMMAND…

The client runs in a network namespace with nothing but loopback. It finds the gateway on the same port: its listener
was made inside, and this process, which stayed outside, answers on it and passes bytes on. Each connection's two
directions are `FOLDER/N.request` and `FOLDER/N.response`, as they were on the wire. Where the kernel permits no
namespaces the client is not started (exit code 125).
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from server.engine.isolation import become_subreaper, isolate_network

NO_NAMESPACE, TERMINATED = 125, 124
HOST = "127.0.0.1"


def pump(source: socket.socket, sink: socket.socket, record: Path) -> None:
    """Copy one direction until it ends, and pass the end on."""
    with record.open("ab", buffering=0) as file, suppress(OSError):
        while data := source.recv(65536):
            file.write(data)
            sink.sendall(data)
    for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with suppress(OSError):
            end.shutdown(how)


def serve(inner: socket.socket, outer: socket.socket, stem: Path) -> None:
    """Join one connection of the client with one to the gateway."""
    with inner, outer:
        back = threading.Thread(target=pump, args=(outer, inner, stem.with_suffix(".response")), daemon=True)
        back.start()
        pump(inner, outer, stem.with_suffix(".request"))
        back.join()


def accept(listener: socket.socket, port: int, folder: Path) -> None:
    """Take the client's connections for as long as this process lives."""
    for number in itertools.count():
        inner, _ = listener.accept()
        outer = socket.create_connection((HOST, port))
        threading.Thread(target=serve, args=(inner, outer, folder / f"{number:03}"), daemon=True).start()


def inside(port: int, channel: socket.socket, command: list[str]) -> None:
    """In the child: leave the network, hand the listener out, become the client."""
    if isolate_network("auto").achieved == "none":
        os._exit(NO_NAMESPACE)
    listener = socket.create_server((HOST, port), backlog=64)
    socket.send_fds(channel, [b"x"], [listener.fileno()])
    listener.close()
    os.environ.pop("PYTHONPATH", None)  # it was for this module
    os.execvp(command[0], command)  # noqa: S606 - the client


def end_all() -> None:
    """Kill whatever the client left behind (Cline a daemon); orphans have become our children, level by level."""
    while True:
        for path in Path("/proc/self/task").glob("*/children"):
            for pid in path.read_text(encoding="ascii").split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(argv: list[str]) -> int:
    """Return the client's exit code."""
    port, folder, command = int(argv[0]), Path(argv[1]), argv[argv.index("--") + 1 :]
    ours, theirs = socket.socketpair()
    become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    child = os.fork()
    if child == 0:
        ours.close()
        inside(port, theirs, command)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if fds:
        listener = socket.socket(fileno=fds[0])
        threading.Thread(target=accept, args=(listener, port, folder), daemon=True).start()
    try:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    finally:
        end_all()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
