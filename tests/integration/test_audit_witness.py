"""A witness on a real socket: cosigns what extends, refuses forks and rollbacks, keeps the proof of either."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from argparse import ArgumentParser
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest

from server.audit.checkpoint import COSIGNATURE_ED25519, VerifierKey, load_audit_key, new_audit_key
from server.audit.client import SyncAuditClient
from server.audit.cosigned import Cosigner, WitnessAddress, WitnessError, WitnessState
from server.audit.entry import new_entry
from server.audit.log import AuditLog
from server.audit.proof import new_receipt, verify_receipt
from server.audit.tags import Event
from server.audit.tail import entries_from
from server.audit.tiles import pack_entries
from server.audit.verify import VerificationError, Verifier
from server.audit.witness import Answer, Witness, make_server
from server.cli import main
from server.commands.audit import configure
from server.errors import AuditLogError
from server.host import Host
from server.settings import Settings
from tests.unit.audit.audit_kit import (
    ROOT,
    fill,
    make_log,
    new_signer,
    read_vkey,
    request_pair,
    wait_until,
    writer_process,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    new_audit_key(tmp_path / "w.key", name="witness.test/one", key_type=COSIGNATURE_ED25519)
    return Witness(load_audit_key(tmp_path / "w.key"), (new_signer().key,), tmp_path / "witness")


@pytest.fixture
def url(witness: Witness) -> Iterator[str]:
    server = make_server(witness, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def submit(directory: Path, url: str, key: VerifierKey) -> int:
    size, failures = Cosigner(directory, (WitnessAddress(url, key),)).round()
    for err in failures.values():
        raise err
    return size


def grow(directory: Path, start: int, count: int) -> None:
    log = AuditLog(directory, new_signer())
    entries = [entry for number in range(start, start + count) for entry in request_pair(number)]
    log.commit(pack_entries(entries), entries)
    log.close()


def test_a_growing_log_is_cosigned_and_receipts_show_it(tmp_path: Path, witness: Witness, url: str) -> None:
    directory = tmp_path / "audit"
    key = witness._signer.key
    for start in range(0, 500, 100):
        grow(directory, start, 100)
        assert submit(directory, url, key) == (start + 100) * 2
        assert submit(directory, url, key) == (start + 100) * 2  # the same again is fine
    report = Verifier(directory, key=new_signer().key, witnesses=(key,)).verify()
    assert report.cosigned == 1_000
    entry, receipt = new_receipt(directory, 17)
    verify_receipt(receipt, entry, new_signer().key, key)


def test_a_fork_is_refused_and_kept_as_evidence(tmp_path: Path, witness: Witness, url: str) -> None:
    directory, fork = tmp_path / "audit", tmp_path / "fork"
    key = witness._signer.key
    grow(directory, 0, 100)
    grow(fork, 1_000, 100)
    assert submit(directory, url, key) == 200
    with pytest.raises(WitnessError, match="refused"):
        submit(fork, url, key)  # the same size, another root
    grow(fork, 1_100, 50)
    with pytest.raises(WitnessError, match="422"):
        submit(fork, url, key)  # larger, and no proof can join them
    assert len(list((tmp_path / "witness").glob("conflict-*.note"))) == 2
    with pytest.raises(VerificationError, match="forged"):  # and anybody who holds the cosigned checkpoint sees it
        Verifier(fork, checkpoints=((directory / "cosignatures").read_text(),)).verify()


def test_a_rollback_is_refused_by_witness_and_writer(tmp_path: Path, witness: Witness, url: str) -> None:
    directory = tmp_path / "audit"
    key = witness._signer.key
    grow(directory, 0, 50)
    shutil.copytree(directory, tmp_path / "old")
    grow(directory, 50, 50)
    submit(directory, url, key)
    with pytest.raises(WitnessError, match="rolled back"):
        submit(tmp_path / "old", url, key)
    shutil.copy(directory / "cosignatures", tmp_path / "old" / "cosignatures")
    with pytest.raises(AuditLogError, match="tail was cut off"):
        AuditLog(tmp_path / "old", new_signer())


def test_a_witness_remembers_over_a_restart(tmp_path: Path, witness: Witness) -> None:
    make_log(tmp_path / "audit", 30)
    note = (tmp_path / "audit/checkpoint").read_text()
    assert witness.add_checkpoint(f"old 0\n\n{note}").status == HTTPStatus.OK
    again = Witness(witness._signer, (new_signer().key,), tmp_path / "witness")
    answer = again.add_checkpoint(f"old 0\n\n{note}")
    assert (answer.status, answer.body, answer.content_type) == (HTTPStatus.CONFLICT, "30\n", "text/x.tlog.size")


def test_the_statuses_of_the_specification(tmp_path: Path, witness: Witness) -> None:
    make_log(tmp_path / "audit", 30)
    note = (tmp_path / "audit/checkpoint").read_text()
    other = AuditLog(tmp_path / "other", new_signer("x", "unknown.test/log"))
    fill(other, 4)
    other.close()
    forged = note.replace(note.splitlines()[-1][-10:], "AAAAAAAAA=")
    hash_line = "A" * 43 + "="
    for body, status in (
        ("", HTTPStatus.BAD_REQUEST),
        ("old 0\n\n", HTTPStatus.BAD_REQUEST),
        (f"old 00\n\n{note}", HTTPStatus.BAD_REQUEST),
        (f"old 31\n\n{note}", HTTPStatus.BAD_REQUEST),
        (f"old 0\n{hash_line}\n\n{note}", HTTPStatus.UNPROCESSABLE_ENTITY),
        (f"old 0\nnot base64\n\n{note}", HTTPStatus.BAD_REQUEST),
        (f"old 0\n{(hash_line + chr(10)) * 64}\n{note}", HTTPStatus.BAD_REQUEST),
        (f"old 0\n\n{(tmp_path / 'other/checkpoint').read_text()}", HTTPStatus.NOT_FOUND),
        (
            f"old 0\n\n{note.replace('audit.test/log', 'audit.test/log', 1).replace('30', '31', 1)}",
            HTTPStatus.FORBIDDEN,
        ),
        (f"old 0\n\n{note}", HTTPStatus.OK),
        (f"old 5\n\n{note}", HTTPStatus.CONFLICT),
    ):
        assert witness.add_checkpoint(body).status == status, body[:40]
    assert witness.add_checkpoint(f"old 30\n\n{forged}").status in (HTTPStatus.FORBIDDEN, HTTPStatus.BAD_REQUEST)


def test_the_command_makes_keys_and_submits(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_log(tmp_path / "audit", 8)
    vkey = str(tmp_path / "w.key.vkey")
    assert main(["audit", "witness", str(tmp_path / "audit"), "--submit", url, "--key", vkey]) == 0
    assert "8 entries cosigned" in capsys.readouterr().out
    assert main(["audit", "witness", "--new-key", "witness.test/two", "--key", str(tmp_path / "two.key")]) == 0
    assert capsys.readouterr().out.startswith("witness.test/two+")
    assert main(["audit", "verify", str(tmp_path / "audit"), "--witness", vkey]) == 0


def test_one_checkpoint_a_round_is_cosigned_by_all_who_answer(tmp_path: Path, witness: Witness, url: str) -> None:
    new_audit_key(tmp_path / "two.key", name="witness.test/two", key_type=COSIGNATURE_ED25519)
    second = Witness(load_audit_key(tmp_path / "two.key"), (new_signer().key,), tmp_path / "second")
    server = make_server(second, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    states: list[tuple[str, WitnessState]] = []
    addresses = (
        WitnessAddress(url, witness._signer.key),
        WitnessAddress(f"http://127.0.0.1:{server.server_address[1]}", second._signer.key),
    )
    cosigner = Cosigner(
        tmp_path / "audit", addresses, on_state=lambda who, state, _: states.append((who.key.name, state))
    )
    both = (witness._signer.key, second._signer.key)
    grow(tmp_path / "audit", 0, 20)
    assert cosigner.round() == (40, {})
    grow(tmp_path / "audit", 20, 20)
    assert cosigner.round() == (80, {})
    assert Verifier(tmp_path / "audit", witnesses=both).verify().cosigned == 80
    server.shutdown()
    server.server_close()
    thread.join(10)
    for _ in range(2):
        size, failures = cosigner.round()
        assert (size, set(failures)) == (80, {"witness.test/two"})
    assert Verifier(tmp_path / "audit", witnesses=both).verify().cosigned == 80  # the same checkpoint: its line stays
    grow(tmp_path / "audit", 40, 20)
    cosigner.round()
    assert Verifier(tmp_path / "audit", witnesses=both[:1]).verify().cosigned == 120
    with pytest.raises(VerificationError, match="expected one"):
        Verifier(tmp_path / "audit", witnesses=both).verify()
    one, two = "witness.test/one", "witness.test/two"
    assert states == [(one, WitnessState.COSIGNS), (two, WitnessState.COSIGNS), (two, WitnessState.LOST)]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no note at all",
        "\u2014 witness.test/one AAAA\n",
        "{line}{line}",
        "{line}\u2014 audit.test/log AAAAAAAAAAAA\n",
    ],
)
def test_an_answer_that_is_no_cosignature_is_not_kept(
    tmp_path: Path, witness: Witness, url: str, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    grow(tmp_path / "audit", 0, 20)
    real = Witness.add_checkpoint

    def lie(self: Witness, body: str) -> Answer:
        honest = real(self, body)
        return honest._replace(body=answer.format(line=honest.body)) if honest.status == HTTPStatus.OK else honest

    monkeypatch.setattr(Witness, "add_checkpoint", lie)
    with pytest.raises(WitnessError):
        submit(tmp_path / "audit", url, witness._signer.key)
    assert not (tmp_path / "audit/cosignatures").exists()


@contextmanager
def command(folder: Path, name: str, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "audit", "witness", *argv], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def events_of(state: Path, name: str) -> list[dict[str, object]]:
    entries = [json.loads(entry) for _, entry in entries_from(state / "audit", 0)]
    return [entry for entry in entries if entry["event"] == name]


def test_a_server_and_its_witness_over_an_outage_and_a_rollback(tmp_path: Path) -> None:
    """Writer, witness and the supervisor's child between them, each a process; the log is set back under them."""
    new_audit_key(tmp_path / "audit.key", name="audit.test/log")
    new_audit_key(tmp_path / "w.key", name="witness.test/one", key_type=COSIGNATURE_ED25519)
    listen = ["--log", str(tmp_path / "audit.key.vkey"), "--state", str(tmp_path / "seen"), "--key"]
    listen += [str(tmp_path / "w.key"), "--listen"]
    directory, key = tmp_path / "audit", VerifierKey.parse((tmp_path / "w.key.vkey").read_text())

    def cosigned() -> int:
        return Verifier(directory, key=read_vkey(tmp_path), witnesses=(key,)).verify().cosigned

    def append(number: int) -> int:
        client = SyncAuditClient(tmp_path / "audit.sock")
        try:
            return client.append(new_entry(Event.ACT_PERFORMED, number=number))
        finally:
            client.close()

    with command(tmp_path, "witness", *listen, "127.0.0.1:0"):
        wait_until(lambda: "http" in (tmp_path / "witness.log").read_text(), deadline_s=30)
        url = (tmp_path / "witness.log").read_text().split()[-1]
        ask = [str(directory), "--submit", url, "--key", str(key), "--every", "0.1"]
        ask += ["--socket", str(tmp_path / "audit.sock")]
        with writer_process(tmp_path), command(tmp_path, "ask", *ask):
            wait_until(lambda: len(events_of(tmp_path, "audit:witness:resumed")) == 1, deadline_s=30)
            last = append(1)
            wait_until(lambda: cosigned() > last)
        shutil.copytree(directory, tmp_path / "old")
        with writer_process(tmp_path), command(tmp_path, "ask", *ask):
            last = append(2)
            wait_until(lambda: (directory / "cosignatures").exists() and cosigned() > last, deadline_s=30)
    port = url.rpartition(":")[2]
    with writer_process(tmp_path), command(tmp_path, "ask", *ask):
        wait_until(lambda: len(events_of(tmp_path, "audit:witness:lost")) == 1, deadline_s=30)
        with command(tmp_path, "witness", *listen, f"127.0.0.1:{port}"):
            last = append(3)
            wait_until(lambda: cosigned() > last, deadline_s=30)
            wait_until(lambda: len(events_of(tmp_path, "audit:witness:resumed")) == 3)
    shutil.rmtree(directory)
    shutil.copytree(tmp_path / "old", directory)  # its cosignatures too: nothing on this host tells
    with (
        command(tmp_path, "witness", *listen, f"127.0.0.1:{port}"),
        writer_process(tmp_path),
        command(tmp_path, "ask", *ask),
    ):
        wait_until(lambda: len(events_of(tmp_path, "audit:witness:refused")) == 1, deadline_s=30)
        (refused,) = events_of(tmp_path, "audit:witness:refused")
        assert "rolled back" in str(refused["reason"])
        client = SyncAuditClient(tmp_path / "audit.sock")
        for number in range(100):  # now it is longer than what the witness has seen, and still another log
            client.append(new_entry(Event.ACT_PERFORMED, number=number))
        client.close()
        wait_until(lambda: list((tmp_path / "seen").glob("conflict-*.note")))
    alerts = [json.loads(line) for line in (tmp_path / "ask.log").read_text().splitlines() if line.startswith("{")]
    assert [(alert["level"], alert["witness"]) for alert in alerts if alert["level"] == "critical"] == [
        ("critical", "witness.test/one")
    ]


def test_the_supervisor_asks_the_witnesses_of_the_settings(tmp_path: Path) -> None:
    witnesses = [{"url": "https://w.test", "key": "a+b+c"}, {"url": "http://v.test:1", "key": "/etc/v.vkey"}]
    settings = Settings.model_validate({"state": tmp_path, "audit": {"witnesses": witnesses, "witness_ca": "/ca.pem"}})
    spec = Host(settings, print)._witness_spec()
    assert spec.argv[:4] == (sys.executable, "-m", "server.cli", "audit")
    parser = ArgumentParser()
    configure(parser)
    args = parser.parse_args(spec.argv[4:])
    assert (args.submit, args.key) == (["https://w.test", "http://v.test:1"], ["a+b+c", "/etc/v.vkey"])
    assert (str(args.directory), str(args.ca), args.every) == (str(tmp_path / "audit"), "/ca.pem", 60.0)
    assert str(args.socket) == str(settings.audit_socket)
    assert not spec.critical
