"""A witness on a real socket: cosigns what extends, refuses forks and rollbacks, keeps the proof of either."""

from __future__ import annotations

import shutil
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest

from server.audit.checkpoint import COSIGNATURE_ED25519, load_audit_key, new_audit_key
from server.audit.log import AuditLog
from server.audit.proof import new_receipt, verify_receipt
from server.audit.tiles import pack_entries
from server.audit.verify import VerificationError, Verifier
from server.audit.witness import Witness, WitnessError, make_server, submit
from server.cli import main
from server.errors import AuditLogError
from tests.unit.audit.audit_kit import fill, make_log, new_signer, request_pair

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
