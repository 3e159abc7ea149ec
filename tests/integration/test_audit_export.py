"""Export: a TLS syslog receiver that comes and goes, files for a write-once store, and the shapes of a SIEM."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from server.audit.checkpoint import verify_checkpoint
from server.audit.client import AuditClient
from server.audit.entry import encode_entry, new_entry
from server.audit.export.files import FileSink
from server.audit.export.shapes import to_cef, to_ocsf
from server.audit.export.ship import Shipper, shipped_up_to
from server.audit.export.syslog import SyslogSink, fields_of
from server.audit.log import AuditLog
from server.audit.tags import Event
from server.audit.tail import entries_from, journal_size
from server.audit.tiles import pack_entries
from server.audit.verify import VerificationError, Verifier
from server.cli import main
from server.errors import ConfigError
from tests.unit.audit.audit_kit import ORIGIN, ROOT, event, make_log, new_signer, read_vkey, wait_until, writer_process

if TYPE_CHECKING:
    from collections.abc import Iterator


class Receiver:
    """A syslog receiver: TLS, octet counting; can be killed with what it has not read, and come back on its port."""

    def __init__(self, authority: trustme.CA, *, keeps_bodies: bool = True) -> None:
        self._keeps_bodies = keeps_bodies
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self._context)
        self.messages: list[dict[str, Any]] = []
        self.port = 0
        self._listener: socket.socket | None = None
        self._streams: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                plain, _ = listener.accept()
                stream = self._context.wrap_socket(plain, server_side=True)
            except OSError:
                return
            self._streams.append(stream)
            thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _read(self, stream: socket.socket) -> None:
        with suppress(OSError, ValueError):
            file = stream.makefile("rb")
            with file:
                while True:
                    length = b""
                    while not length.endswith(b" "):
                        byte = file.read(1)
                        if not byte:
                            return
                        length += byte
                    data = file.read(int(length))
                    if len(data) == int(length):
                        message = fields_of(data)
                        if not self._keeps_bodies:
                            message.pop("body")
                        self.messages.append(message)

    def kill(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for stream in self._streams:
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            stream.close()
        self._streams.clear()
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    @property
    def entries(self) -> list[int]:
        return [message["index"] for message in self.messages if message["message_id"] != "audit.checkpoint"]


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


def in_order_once(indexes: list[int]) -> list[int]:
    """Return the indexes without the second copies that a resend brings; each new one must follow the one before."""
    seen: list[int] = []
    for index in indexes:
        if index == len(seen):
            seen.append(index)
        else:
            assert index < len(seen), f"{index} came before {len(seen)}"
    return seen


def sink(port: int, folder: Path, shape: str = "json") -> SyslogSink:
    return SyslogSink("localhost", port, origin=ORIGIN, shape=shape, ca=folder / "ca.pem")


def memory_kib(process: subprocess.Popen[bytes], field: str = "VmRSS") -> int:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0])


@contextmanager
def exporter(state: Path, name: str, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """What the supervisor starts for one receiver."""
    command = [sys.executable, "-m", "server.cli", "audit", "export", str(state / "audit"), *argv]
    with (state / f"{name}.log").open("ab") as log:
        process = subprocess.Popen([*command, "--socket", str(state / "audit.sock")], cwd=ROOT, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


async def load(state: Path, seconds: float, a_second: int) -> None:
    """Requests that are accepted and finished, half of `a_second` each second."""
    client = AuditClient(state / "audit.sock")
    started_s, number = time.monotonic(), 0
    while (now_s := time.monotonic() - started_s) < seconds:
        while number < now_s * a_second / 2:
            request_id = f"r{started_s}-{number}"
            await client.append(new_entry(Event.REQUEST_ACCEPTED, request_id=request_id, filler="x" * 300))
            await client.append(new_entry(Event.REQUEST_FINISHED, request_id=request_id, outcome="completed"))
            number += 1
        await asyncio.sleep(0.01)
    await client.aclose()


def outage(state: Path, authority: trustme.CA, *, down_s: float, a_second: int) -> dict[str, int]:
    """Take both receivers away under load and bring them back; return what was seen, memory in KiB."""
    receiver, worm = Receiver(authority, keeps_bodies=False), state / "worm"
    receiver.start()
    syslog = f"syslog+tls://localhost:{receiver.port}"
    with (
        writer_process(state, "--segment-bytes", "2000000") as writer,
        exporter(state, "syslog", "--to", syslog, "--ca", str(state / "ca.pem"), "--format", "ocsf") as first,
        exporter(state, "files", "--to", f"file://{worm}") as second,
    ):
        asyncio.run(load(state, 2, a_second))
        wait_until(lambda: receiver.entries and any(worm.glob("*.jsonl")), deadline_s=60)
        receiver.kill()
        worm.rename(state / "worm-aside")
        worm.write_text("a store that is away: no folder can be made here")
        asyncio.run(load(state, down_s * 0.3, a_second))
        names = {"writer": writer, "syslog": first, "files": second}
        before = {name: memory_kib(process) for name, process in names.items()}
        asyncio.run(load(state, down_s * 0.7, a_second))
        grown = {name: memory_kib(process) - before[name] for name, process in names.items()}
        behind = journal_size(state / "audit") - len(set(receiver.entries))
        receiver.start()
        worm.unlink()
        (state / "worm-aside").rename(worm)
        back_at = journal_size(state / "audit")
        asyncio.run(load(state, 2, a_second))
        resumed = b'"event":"audit:export:resumed"'
        wait_until(
            lambda: sum(resumed in entry for _, entry in entries_from(state / "audit", back_at)) == 2, deadline_s=120
        )
        total = journal_size(state / "audit")
        wait_until(
            lambda: total - 1 in receiver.entries[-50_000:] and (shipped_up_to(state / "export") or 0) >= total,
            deadline_s=120,
        )
        peak = {f"{name} peak": memory_kib(process, "VmHWM") - before[name] for name, process in names.items()}
    seen = {"entries": total, "behind": behind, "sent again": len(receiver.entries) - total, **grown, **peak}
    print(seen)
    assert in_order_once(receiver.entries)[:total] == list(range(total))
    # The store may have gone in the middle of a file: what has a dot before its name was never given its own.
    lines = [line for path in sorted(worm.glob("[0-9]*.jsonl")) for line in path.read_bytes().splitlines()]
    log = [b'{"index":%d,"entry":%b}' % item for item in entries_from(state / "audit", 0)]
    assert lines[:total] == log[:total]
    events = Counter(json.loads(line)["entry"]["event"] for line in lines)
    assert (events["audit:export:delayed"], events["audit:export:resumed"]) == (2, 2)
    report = Verifier(state / "audit", key=read_vkey(state)).verify()
    assert report.num_open == report.num_unknown == 0
    receiver.kill()
    return seen


def check_flat(seen: dict[str, int]) -> None:
    for name in ("writer", "syslog", "files"):
        assert seen[name] < 4 * 1024, f"{name} grew by {seen[name]} KiB while the receivers were away"
        assert seen[f"{name} peak"] < 24 * 1024, f"{name} grew by {seen[f'{name} peak']} KiB while catching up"


def test_two_receivers_down_under_load_lose_nothing(tmp_path: Path, authority: trustme.CA) -> None:
    check_flat(outage(tmp_path, authority, down_s=4, a_second=800))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_receivers_down_for_ten_minutes_under_load_lose_nothing(tmp_path: Path, authority: trustme.CA) -> None:
    check_flat(outage(tmp_path, authority, down_s=600, a_second=200))


def test_what_arrives_is_the_entry_and_the_checkpoint(tmp_path: Path, authority: trustme.CA) -> None:
    make_log(tmp_path / "audit", 20)
    receiver = Receiver(authority)
    receiver.start()
    to = f"syslog+tls://localhost:{receiver.port}"
    command = ["audit", "export", str(tmp_path / "audit"), "--to", to, "--ca", str(tmp_path / "ca.pem"), "--once"]
    assert main(command) == 0
    wait_until(lambda: len(receiver.messages) == 21)
    first, *_, last = receiver.messages
    assert first["priority"] == 13 * 8 + 6
    assert first["app"] == "strongroom"
    assert json.loads(first["body"])["entry"]["request_id"] == "req-00000000"
    note = json.loads(last["body"])["checkpoint"]
    assert verify_checkpoint(note, new_signer().key).size == 20
    # What was shipped shows a cut tail: this is what it is for.
    kept = tmp_path / "kept"
    kept.write_text(note)
    make_log(tmp_path / "cut", 10)
    with pytest.raises(VerificationError, match="cut off"):
        Verifier(tmp_path / "cut", checkpoints=(kept.read_text(),)).verify()
    assert main(command) == 0  # nothing new: nothing is sent
    time.sleep(0.1)
    assert len(receiver.messages) == 21
    receiver.kill()


def test_a_receiver_that_cannot_prove_its_name_gets_nothing(tmp_path: Path, authority: trustme.CA) -> None:
    other = trustme.CA()
    receiver = Receiver(other)
    receiver.start()
    with pytest.raises(OSError, match="certificate verify failed"):
        sink(receiver.port, tmp_path).send([b"x"])
    assert receiver.messages == []
    receiver.kill()


def test_files_hold_the_log_in_order_and_are_never_written_twice(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", new_signer())
    for number in range(2_000):
        entry = event("admin:act:performed", number, filler="x" * 300)
        log.commit(pack_entries([entry]), [entry])
    log.close()
    worm = tmp_path / "worm"
    assert main(["audit", "export", str(tmp_path / "audit"), "--to", f"file://{worm}", "--once"]) == 0
    files = sorted(worm.glob("*.jsonl"))
    assert len(files) > 1
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(2_000))
    for path in files:
        note = path.with_suffix(".checkpoint").read_text()
        assert verify_checkpoint(note, new_signer().key).size == int(path.stem.split("-")[1]) + 1
    stamps = {path: path.stat().st_mtime_ns for path in worm.iterdir()}
    (cursor,) = (tmp_path / "export").iterdir()
    cursor.unlink()  # the whole log again: the same bytes under the same names
    assert main(["audit", "export", str(tmp_path / "audit"), "--to", f"file://{worm}", "--once"]) == 0
    assert {path: path.stat().st_mtime_ns for path in worm.iterdir()} == stamps


@pytest.mark.parametrize("cut_at", [".jsonl", ".checkpoint"])
def test_a_range_that_grew_after_a_cut_stands_once(
    tmp_path: Path, cut_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes away just behind a rename; what came meanwhile is sent with the same range again."""
    make_log(tmp_path / "audit", 40)
    sink = FileSink(tmp_path / "worm", origin=ORIGIN)
    lines = [sink.message(index, entry) for index, entry in entries_from(tmp_path / "audit", 0)]
    sink.send([*lines[:10], b"note"])
    cut = Path.rename

    def rename(path: Path, target: Path) -> None:
        cut(path, target)
        if target.suffix == cut_at:
            raise OSError("the store went away")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="went away"):
            sink.send([*lines[10:20], b"note"])
    again = sink if cut_at == ".jsonl" else FileSink(tmp_path / "worm", origin=ORIGIN)  # the exporter was killed
    again.send([*lines[10:30], b"note"])
    again.send([*lines[30:], b"note"])
    written = [path.read_bytes() for path in sorted((tmp_path / "worm").glob("*.jsonl"))]
    assert b"".join(written) == b"".join(lines)


def test_a_damaged_cursor_is_named(tmp_path: Path) -> None:
    (tmp_path / "cursor").write_text("{}")
    with pytest.raises(ConfigError, match="cursor"):
        Shipper(tmp_path, FileSink(tmp_path / "worm", origin=ORIGIN), tmp_path / "cursor")


NASTY = {
    "v": 1, "event": "gateway:request:refused", "time": "2026-11-22T21:10:00.123456Z", "outcome": "denied",
    "request_id": "r|1=\\x", "code": "permission_denied", "route": "/v1/a=b|c\\d",
    "client": {"address": "192.0.2.1", "agent": 'curl="x" | cs1=evil \\ CEF:0|'},
    "principal": {"subject": "al=ice|", "tenant": "blue"},
}  # fmt: skip


def test_cef_is_well_formed_whatever_a_client_sent() -> None:
    text = to_cef(7, NASTY, b"")
    assert "\n" not in text
    unescaped = [at for at, char in enumerate(text) if char == "|" and text[at - 1] != "\\"]
    assert len(unescaped[:7]) == 7
    assert text.startswith("CEF:0|Strongroom|Strongroom|1|gateway:request:refused|")
    extension = text.split("|", 7)[7]
    assert "suser=al\\=ice|" in extension
    assert "cs1\\=evil" in extension
    assert "externalId=7" in extension


def test_ocsf_has_what_the_schema_requires() -> None:
    shaped = json.loads(to_ocsf(7, NASTY, b""))
    for field in (
        "activity_id",
        "category_uid",
        "class_uid",
        "type_uid",
        "time",
        "severity_id",
        "metadata",
        "api",
        "actor",
    ):
        assert field in shaped
    assert shaped["type_uid"] == shaped["class_uid"] * 100 + shaped["activity_id"]
    assert shaped["metadata"]["product"]["vendor_name"] == "Strongroom"
    assert shaped["status_id"] == 2
    refused = json.loads(to_ocsf(8, {**NASTY, "event": "gateway:credential:refused", "key_id": "k1"}, b""))
    assert (refused["class_uid"], refused["user"]["name"]) == (3002, "al=ice|")
    started = json.loads(to_ocsf(9, {"v": 1, "event": "supervisor:engine:started", "time": NASTY["time"]}, b""))
    assert (started["class_uid"], started["activity_id"]) == (6002, 3)


def test_every_event_has_every_shape() -> None:
    for name in Event:
        entry = json.loads(encode_entry(new_entry(name)))
        assert to_cef(1, entry, b"").startswith("CEF:0|")
        assert json.loads(to_ocsf(1, entry, b""))["metadata"]["event_code"] == name
