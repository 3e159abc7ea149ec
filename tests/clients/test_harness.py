"""What holds the client tests up: the cut-off network, no process left behind, a table that forgets nothing."""

from __future__ import annotations

import http.server
import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from tests.clients.conftest import BEGIN, COLUMNS, END, with_table
from tests.clients.drive import run_offline
from tests.clients.offline import NO_NAMESPACE

if TYPE_CHECKING:
    from pathlib import Path

CLIENT = """
import http.client, socket, subprocess, sys
reached, other = int(sys.argv[1]), int(sys.argv[2])
connection = http.client.HTTPConnection("127.0.0.1", reached)
connection.request("POST", "/x", b"{}")
print(connection.getresponse().status)
connection.close()
try:
    socket.create_connection(("127.0.0.1", other), 2)
    print("got out")
except OSError:
    print("cut off")
print(subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL).pid)
"""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(418)
        self.send_header("content-length", "0")
        self.end_headers()

    @override
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_client_reaches_the_gateway_alone_and_leaves_nothing_behind(tmp_path: Path):
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    work = tmp_path / "work"
    work.mkdir()
    ports = [str(server.server_address[1]) for server in servers]
    try:
        base = f"http://127.0.0.1:{ports[0]}"
        outcome = run_offline([sys.executable, "-c", CLIENT, *ports], {"PATH": os.environ["PATH"]}, base, work, 60)
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
    if outcome.code == NO_NAMESPACE:
        pytest.skip("this kernel permits no network namespaces")
    assert outcome.code == 0, outcome.text
    status, net, left = outcome.out.split("\n")[:3]
    assert (status, net) == ("418", "cut off")
    assert outcome.statuses == [418]
    with pytest.raises(ProcessLookupError):
        os.kill(int(left), 0)


def test_the_table_keeps_what_a_run_did_not_touch():
    document = f"before\n{BEGIN}\n{END}\nafter"
    once = with_table(document, {"a": {"exchange": "driven"}, "b": {"streams": "fails"}}, {"a": "1"}, "2026-01-01")
    twice = with_table(once, {"a": {"tool call": "driven"}}, {"a": "2"}, "2026-01-02")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in twice.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows] == ["client", "---", "a", "b"]
    found = dict(zip(("version", "date", *COLUMNS), rows[2][1:], strict=True))
    assert (found["version"], found["date"]) == ("2", "2026-01-02")
    assert {name for name, cell in found.items() if cell == "driven"} == {"exchange", "tool call"}
    assert rows[3][1:5] == ["–", "2026-01-01", "–", "fails"]
    assert twice.startswith("before")
    assert twice.endswith("after")
