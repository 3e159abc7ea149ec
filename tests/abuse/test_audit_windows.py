"""L1: a log that is slow, or gone, at the worst moments: nothing before the first record, no end before the last."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.gateway.kit import MODEL, make_kit, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.gateway.kit import GatewayKit

ACCEPTED, FINISHED = b'"gateway:request:accepted"', b'"gateway:request:finished"'
ANSWER = "Here is what I would do:"
ROUTES: dict[str, tuple[dict[str, Any], bytes]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "hi"}]}, b"data: [DONE]"),
    "/v1/completions": ({"prompt": "def f():"}, b"data: [DONE]"),
    "/v1/responses": ({"input": "hi"}, b"response.completed"),
    "/v1/messages": ({"max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]}, b"message_stop"),
    "/v1/fim/completions": ({"prompt": "def f():", "suffix": "\n"}, b"data: [DONE]"),
    "/infill": ({"input_prefix": "def f():", "input_suffix": "\n"}, b'"stop":true'),
}
CASES = [(route, stream) for route in ROUTES for stream in (True, False)]


class SlowLog:
    """Stands between gateway and writer; from a chosen entry on, the writer's answers wait."""

    def __init__(self, path: Path) -> None:
        self._real = path.with_name("real.sock")
        path.rename(self._real)
        self._word: bytes | None = None
        self._free = threading.Event()
        self._held = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()
        self.release()

    def hold(self, word: bytes) -> None:
        """Hold back what the writer says of the next entry with `word` in it, and everything after."""
        self._held.clear()
        self._word = word

    def wait(self) -> None:
        """Return once the entry is with the writer."""
        assert self._held.wait(30)

    def release(self) -> None:
        """Let the answers go."""
        self._word = None
        self._free.set()

    def cut(self) -> None:
        """End all connections, and let new ones be as they should."""
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()
        self.release()

    def close(self) -> None:
        """Stop."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                writer = socket.socket(socket.AF_UNIX)
                writer.connect(str(self._real))
                self._sockets += (client, writer)
                threading.Thread(target=self._to_writer, args=(client, writer), daemon=True).start()
                threading.Thread(target=self._to_client, args=(client, writer), daemon=True).start()

    def _to_writer(self, client: socket.socket, writer: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                is_it = self._word is not None and self._word in data
                if is_it:
                    self._word = None
                    self._free.clear()
                writer.sendall(data)
                if is_it:
                    self._held.set()
            writer.shutdown(socket.SHUT_WR)

    def _to_client(self, client: socket.socket, writer: socket.socket) -> None:
        with client, writer, suppress(OSError):
            while data := writer.recv(65536):
                self._free.wait()
                client.sendall(data)


class World:
    """A gateway before a slow log."""

    def __init__(self, kit: GatewayKit, log: SlowLog, key: str) -> None:
        self.kit, self.log, self._key = kit, log, key

    def ask(self, route: str, *, stream: bool) -> socket.socket:
        data = json.dumps({"model": MODEL, "stream": stream, **ROUTES[route][0]}).encode()
        sock = socket.create_connection(("127.0.0.1", self.kit.settings.public.port))
        head = (
            f"POST {route} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._key}\r\n"
            f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        sock.sendall(head.encode() + data)
        return sock

    def requests(self) -> list[tuple[str, ...]]:
        """What the log says of each request, oldest first: its entries, each by its outcome or `accepted`."""
        found: dict[str, list[str]] = defaultdict(list)
        for entry in self.kit.entries():
            if "request_id" in entry:
                found[entry["request_id"]].append(entry.get("outcome", "accepted"))
        return [tuple(entries) for entries in found.values()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    kit = make_kit(tmp_path_factory.mktemp("windows"))
    log = None
    try:
        kit.start_writer()
        log = SlowLog(kit.settings.audit_socket)
        for model in kit.settings.models:
            kit.start_engine(model.id)
        kit.start_gateway()
        key = kit.new_key(groups={"developers"})
        kit.wait_for_key(key)
        kit.control(num_tokens=6)
        yield World(kit, log, key)
    finally:
        if log is not None:
            log.close()
        kit.stop()


def read_for(sock: socket.socket, seconds: float) -> bytes:
    """What comes within a while."""
    answer, end_s = b"", time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        sock.settimeout(left_s)
        try:
            data = sock.recv(65536)
        except TimeoutError:
            break
        if not data:
            break
        answer += data
    return answer


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(60)
    answer = b""
    while data := sock.recv(65536):
        answer += data
    return answer


@pytest.mark.parametrize(("route", "stream"), CASES)
def test_nothing_runs_before_the_first_record_and_nothing_ends_before_the_last(
    world: World, route: str, stream: bool
) -> None:
    kit, log = world.kit, world.log
    before = kit.stats()
    log.hold(ACCEPTED)
    with world.ask(route, stream=stream) as sock:
        log.wait()
        assert read_for(sock, 0.15) == b""
        assert kit.stats() == before  # the engine has not seen a byte of it
        log.hold(FINISHED)
        log._free.set()
        log.wait()
        early = read_for(sock, 0.15)
        assert ROUTES[route][1] not in early
        assert b'"stop"' not in early.replace(b'"stop":false', b"") or route == "/v1/responses"
        assert bool(early) == stream  # its text may be there, of a plain answer nothing
        log.release()
        assert ROUTES[route][1] in read_all(sock) or not stream
    wait_until(lambda: world.requests()[-1] == ("accepted", "completed"))


@pytest.mark.parametrize(("route", "stream"), CASES[4:8])
def test_who_leaves_while_the_disk_works_is_on_record_once(world: World, route: str, stream: bool) -> None:
    for word, outcome in ((ACCEPTED, "aborted"), (FINISHED, "completed")):
        world.log.hold(word)
        with world.ask(route, stream=stream):
            world.log.wait()
        time.sleep(0.1)
        world.log.release()
        wait_until(lambda outcome=outcome: world.requests()[-1] == ("accepted", outcome))


@pytest.mark.parametrize(("route", "stream"), CASES[4:8])
def test_a_log_that_goes_away_then_ends_no_answer_well(world: World, route: str, stream: bool) -> None:
    for word in (ACCEPTED, FINISHED):
        with world.ask(route, stream=False) as sock:  # with it goes what could not be closed before
            assert b" 200 OK" in read_all(sock)
        world.log.hold(word)
        with world.ask(route, stream=stream) as sock:
            world.log.wait()
            world.log.cut()
            answer = read_all(sock)
        assert b"audit_unavailable" in answer
        assert ROUTES[route][1] not in answer
        assert (b" 200 OK" in answer) == (stream and word == FINISHED)
        # Accepted, but not told so: the gateway closes it, or the writer, whichever hears of the cut first. Or whole,
        # but not told to be.
        expected = ("failed", "unknown") if word == ACCEPTED else ("completed",)
        wait_until(lambda expected=expected: world.requests()[-1][1:] in [(one,) for one in expected])


def test_one_who_leaves_while_it_sends_its_body_broke_nothing(world: World) -> None:
    port = world.kit.settings.public.port
    with socket.create_connection(("127.0.0.1", port)) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world._key}\r\n"
        sock.sendall(head.encode() + b"content-length: 100\r\n\r\n{")
        time.sleep(0.1)
    wait_until(lambda: world.kit.entries()[-1].get("outcome") == "aborted")
    assert world.kit.entries()[-1]["code"] == ""
