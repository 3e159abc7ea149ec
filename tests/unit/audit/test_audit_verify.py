"""The verifier and its command line: what is fine, what is named, and how."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest

from server.audit import journal
from server.audit.checkpoint import COSIGNATURE_ED25519, FileSigner, cosign, signature_line, split_note
from server.audit.log import AuditLog
from server.audit.tiles import pack_entries
from server.audit.verify import VerificationError, Verifier
from server.cli import main
from tests.unit.audit.audit_kit import event, make_log, new_signer, request_pair


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "audit"
    make_log(directory, 600, segment_bytes=60_000)
    return directory


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "audit"))


def old_checkpoint(directory: Path, size: int) -> str:
    for first, path in journal.list_segments(directory):
        with path.open("rb") as file:
            file.readline()
            for commit in journal.read_commits(file, first):
                if commit.first + commit.count >= size:
                    return commit.note.decode()
    raise AssertionError(size)


def test_a_copy_verifies_with_a_pinned_key(copy: Path) -> None:
    (copy / "lock").unlink()
    report = Verifier(copy, key=new_signer().key, checkpoints=(old_checkpoint(copy, 300),)).verify()
    assert (report.size, report.num_accepted, report.num_finished, report.num_open) == (600, 300, 300, 0)
    assert report.is_pinned


def test_tiles_alone_verify_when_told_so(copy: Path) -> None:
    shutil.rmtree(copy / "journal")
    with pytest.raises(VerificationError, match="--no-journal"):
        Verifier(copy).verify()
    assert Verifier(copy, use_journal=False).verify().size == 600


def test_another_pinned_key_is_refused(copy: Path) -> None:
    with pytest.raises(VerificationError, match="pinned"):
        Verifier(copy, key=new_signer("other").key).verify()


def test_a_cut_tail_shows_against_a_checkpoint_kept_elsewhere(copy: Path, tmp_path: Path) -> None:
    kept = (copy / "checkpoint").read_text()
    shutil.rmtree(copy)
    make_log(copy, 400)  # the same beginning, signed with the stolen key, consistent in itself
    assert Verifier(copy, key=new_signer().key).verify().size == 400
    with pytest.raises(VerificationError, match="tail was cut off") as caught:
        Verifier(copy, key=new_signer().key, checkpoints=(kept,)).verify()
    assert caught.value.index == 400


def test_a_fork_shows_against_a_checkpoint_kept_elsewhere(copy: Path) -> None:
    kept = old_checkpoint(copy, 300)
    shutil.rmtree(copy)
    log = AuditLog(copy, new_signer())
    entries = [entry for number in range(1000, 1400) for entry in request_pair(number)]
    log.commit(pack_entries(entries), entries)
    log.close()
    with pytest.raises(VerificationError, match="forged"):
        Verifier(copy, checkpoints=(kept,)).verify()


@pytest.mark.parametrize(
    ("entries", "index", "text"),
    [
        ([b'{"b":1,"a":2}'], 0, "canonical"),
        ([b"[]"], 0, "object"),
        ([event("admin:act:performed", 1), b"{nonsense}"], 1, "not JSON"),
        ([event("gateway:request:finished", 1, request_id="x", outcome="completed")], 0, "not open"),
        ([event("gateway:request:accepted", 1, request_id="x")] * 2, 1, "accepted twice"),
    ],
)
def test_wrong_entries_are_named_though_signed(tmp_path: Path, entries: list[bytes], index: int, text: str) -> None:
    log = AuditLog(tmp_path, new_signer())
    log.commit(pack_entries(entries), entries)
    log.close()
    with pytest.raises(VerificationError, match=text) as caught:
        Verifier(tmp_path).verify()
    assert caught.value.index == index


def test_files_that_do_not_belong_are_named(copy: Path) -> None:
    (copy / "tile/0/009").write_bytes(b"x")
    with pytest.raises(VerificationError, match="tile/0/009"):
        Verifier(copy).verify()
    (copy / "tile/0/009").unlink()
    (copy / "notes.txt").write_text("x")
    with pytest.raises(VerificationError, match=r"notes\.txt"):
        Verifier(copy).verify()


def test_a_witness_that_must_have_cosigned(copy: Path) -> None:
    witness = FileSigner("witness.test/w", new_signer("w")._private_key, key_type=COSIGNATURE_ED25519)
    with pytest.raises(VerificationError, match="witness"):
        Verifier(copy, witnesses=(witness.key,)).verify()
    note = (copy / "checkpoint").read_text()
    (copy / "cosignatures").write_text(note + cosign(split_note(note)[0], witness, 1_700_000_000))
    assert Verifier(copy, witnesses=(witness.key,)).verify().cosigned == 600


def test_signatures_of_other_kinds_may_stand_on_a_checkpoint(copy: Path) -> None:
    """Key rotation, witnesses, and an ML-DSA-44 cosignature (key id, time, 2,420 bytes) go beside the log's own."""
    note = (copy / "checkpoint").read_text()
    post_quantum = signature_line("audit.test/log", b"\x01\x02\x03\x04", bytes(8 + 2420))
    (copy / "checkpoint").write_text(note + post_quantum + signature_line("other.test/key", b"abcd", bytes(64)))
    assert Verifier(copy, key=new_signer().key).verify().published == 600
    own = note.splitlines(keepends=True)[-1]
    (copy / "checkpoint").write_text(note.replace(own, post_quantum))
    with pytest.raises(VerificationError, match="0 signatures"):
        Verifier(copy, key=new_signer().key).verify()


def test_a_closed_segment_is_vouched_for_by_the_next(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    key = make_log(directory, 300, segment_bytes=20_000, group=1, seal=True)
    segments = journal.list_segments(directory)
    assert len(segments) > 3
    Verifier(directory, key=key).verify()
    _, path = segments[1]
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        file.readline()
        commit = list(journal.read_commits(file, segments[1][0]))[3]
    # A signature inside a closed segment is changed, checksum and all: nothing that it says matters any more.
    at = commit.end - 4 - 20
    data[at] = ord("A") if data[at] != ord("A") else ord("B")
    data[commit.end - 4 : commit.end] = zlib.crc32(bytes(data[commit.offset : commit.end - 4])).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(VerificationError) as caught:
        Verifier(directory, key=key).verify()
    assert caught.value.index == commit.first


def test_the_command_verifies_and_names(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", str(copy), "--key", str(new_signer().key), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 600
    assert main(["audit", "verify", str(copy)]) == 0
    assert "pin it with --key" in capsys.readouterr().out
    path = journal.list_segments(copy)[0][1]
    path.write_bytes(path.read_bytes().replace(b"req-00000100", b"req-00000900", 1))
    assert main(["audit", "verify", str(copy), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["first_bad_entry"] == 200
    assert "First bad entry: 200" in captured.err


def test_the_command_proves_and_checks(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "417.tlog-proof"
    key = str(new_signer().key)
    assert main(["audit", "prove", "417", str(copy), "--out", str(out)]) == 0
    check = ["audit", "prove", "417", "--check", str(out), "--entry", str(out.with_suffix(".json")), "--key", key]
    assert main(check) == 0
    assert "at 600 entries" in capsys.readouterr().out
    out.with_suffix(".json").write_bytes(out.with_suffix(".json").read_bytes().replace(b"finished", b"accepted"))
    assert main(check) == 1
    assert main(["audit", "prove", "600", str(copy)]) == 1
    assert "not under a published checkpoint" in capsys.readouterr().err


def test_the_command_prints_the_tail(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "tail", str(copy), "-n", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [597, 598, 599]
    assert lines[-1]["entry"]["request_id"] == "req-00000299"
