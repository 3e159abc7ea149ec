"""Known answers: a fixed log comes out byte for byte, and Go agrees with its receipts."""

from __future__ import annotations

import json
import subprocess
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from server.audit.checkpoint import VerifierKey
from server.audit.merkle import ProofError
from server.audit.proof import Receipt, new_receipt, verify_receipt
from server.audit.tags import Event
from tests.unit.audit.audit_kit import ROOT, make_log, new_signer
from tests.vectors.audit.go import build_go

if TYPE_CHECKING:
    from pathlib import Path

VECTOR = ROOT / "tests/vectors/audit/log-300.json"


def folder_digest(directory: Path) -> str:
    digest = sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "lock"):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vector")
    make_log(directory, 300)
    return directory


def test_a_fixed_log_never_changes(log: Path) -> None:
    vector = json.loads(VECTOR.read_text())
    entry, receipt = new_receipt(log, 127)
    assert vector == {
        "vkey": (log / "vkey").read_text().strip(),
        "checkpoint": (log / "checkpoint").read_text(),
        "entry_127": entry.decode(),
        "receipt_127": receipt.text(),
        "files_sha256": folder_digest(log),
    }


def test_receipts_verify_here_and_in_go(log: Path, tmp_path: Path) -> None:
    goproof = build_go("goproof")
    key = new_signer().key
    for index in (0, 1, 127, 255, 256, 299):
        entry, receipt = new_receipt(log, index)
        assert verify_receipt(Receipt.parse(receipt.text()), entry, key).size == 300
        (tmp_path / "receipt").write_text(receipt.text())
        (tmp_path / "entry").write_bytes(entry)
        command = [str(goproof), str(key), str(tmp_path / "receipt"), str(tmp_path / "entry")]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"OK {index}\n"
        (tmp_path / "entry").write_bytes(entry + b" ")
        assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 1
        with pytest.raises(ProofError):
            verify_receipt(receipt, entry + b" ", key)


def test_a_receipt_with_extra_data_comes_back(log: Path) -> None:
    _, receipt = new_receipt(log, 5, extra=b"more")
    assert Receipt.parse(receipt.text()) == receipt


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("c2sp.org/tlog-proof@v1", "c2sp.org/tlog-proof@v2"),
        ("index 5", "index 05"),
        ("index 5", "index -5"),
        ("index 5\n", ""),
        ("\n\naudit.test", "\naudit.test"),
        ("=\n", "!\n"),
    ],
)
def test_malformed_receipts_are_refused(log: Path, old: str, new: str) -> None:
    _, receipt = new_receipt(log, 5)
    with pytest.raises(ProofError):
        Receipt.parse(receipt.text().replace(old, new, 1))


def test_a_receipt_under_another_key_is_refused(log: Path) -> None:
    entry, receipt = new_receipt(log, 5)
    with pytest.raises(ProofError, match="refused"):
        verify_receipt(receipt, entry, VerifierKey.parse(str(new_signer("other").key)))


def test_every_event_is_in_the_specification() -> None:
    text = (ROOT / "docs/specs/audit-log.md").read_text()
    assert [event for event in Event if f"`{event}`" not in text] == []
