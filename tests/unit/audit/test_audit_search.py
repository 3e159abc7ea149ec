"""Search, tail cursors, receipts over the API, and pruning."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from server.audit import journal
from server.audit.checkpoint import VerifierKey
from server.audit.log import AuditLog
from server.audit.proof import Receipt, new_receipt, verify_receipt
from server.audit.prune import Plan, RetentionPolicy, plan, prune
from server.audit.receipts import Receipts
from server.audit.search import Query, SearchIndex
from server.audit.tail import Cursor, entries_from
from server.audit.tiles import pack_entries
from server.audit.verify import VerificationError, Verifier
from server.cli import main
from server.errors import AuditUnavailableError, ConfigError, NotFoundError
from server.types import SubjectId, TenantId
from tests.unit.audit.audit_kit import PRINCIPAL, event, new_signer

if TYPE_CHECKING:
    from pathlib import Path


def requests(start: int, count: int, subject: str, model: str = "smol", **fields: Any) -> list[bytes]:
    entries = []
    for number in range(start, start + count):
        common = {"request_id": f"r{number}", "principal": {"subject": subject, "tenant": "blue"}, "model": model}
        entries.append(event("gateway:request:accepted", number, **common, **fields))
        entries.append(event("gateway:request:finished", number, **common, outcome="completed"))
    return entries


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path / "audit", new_signer(), segment_bytes=20_000, reserve_bytes=1_000)
    finding: dict[str, Any] = {"scan_input": {"state": "findings", "findings": [{"rule": "sql", "cwe": "CWE-89"}]}}
    entries = [*requests(0, 100, "alice"), *requests(100, 100, "bob", "big"), *requests(200, 1, "alice", **finding)]
    for start in range(0, len(entries), 11):
        if log.is_segment_full:
            log.rotate()
        part = entries[start : start + 11]
        log.commit(pack_entries(part), part)
    log.close()
    return tmp_path / "audit"


def found(directory: Path, query: Query) -> list[int]:
    index = SearchIndex(directory)
    try:
        index.update()
        return [at for at, _ in index.find(query, limit=1_000)]
    finally:
        index.close()


def test_search_by_who_what_and_when(directory: Path) -> None:
    assert len(found(directory, Query(subject="alice"))) == 202
    assert len(found(directory, Query(model="big", event="gateway:request:accepted"))) == 100
    assert found(directory, Query(finding="CWE-89")) == [400]
    assert found(directory, Query(request_id="r5")) == [11, 10]
    assert found(directory, Query(since="2027")) == []
    assert len(found(directory, Query(until="2027", outcome="completed"))) == 201
    assert found(directory, Query(subject="alice' OR 1=1 --")) == []


def test_the_index_follows_the_log_and_can_be_built_again(directory: Path) -> None:
    before = found(directory, Query(subject="bob"))
    log = AuditLog(directory, new_signer())
    entries = requests(500, 2, "bob")
    log.commit(pack_entries(entries), entries)
    log.close()
    assert len(found(directory, Query(subject="bob"))) == len(before) + 4
    SearchIndex.remove(directory)
    assert len(found(directory, Query(subject="bob"))) == len(before) + 4


def test_the_command_searches(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "search", str(directory), "--subject", "bob", "-n", "2", "--rebuild"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [399, 398]
    assert lines[0]["entry"]["principal"]["subject"] == "bob"


def test_a_cursor_reads_each_entry_once_across_segments(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, new_signer(), segment_bytes=3_000, reserve_bytes=700)
    cursor, seen = Cursor(tmp_path), list[int]()
    for number in range(60):
        if log.is_segment_full:
            log.rotate()
        log.commit(pack_entries([event("admin:act:performed", number)]), [event("admin:act:performed", number)])
        if number % 7 == 0:
            seen += [commit.first for _, commit in cursor.read()]
    seen += [commit.first for _, commit in cursor.read()]
    log.release()
    assert seen == list(range(60))
    assert [index for index, _ in entries_from(tmp_path, 33)] == list(range(33, 60))
    assert len(journal.list_segments(tmp_path)) > 3


async def test_a_receipt_is_for_the_caller_alone(directory: Path) -> None:
    receipts = Receipts(directory)
    for reference in ("10", "r5"):
        receipt = await receipts.find(reference, PRINCIPAL)
        assert receipt["index"] == 10
        assert receipt["entry"]["request_id"] == "r5"
        data = journal_entry(directory, 10)
        verify_receipt(Receipt.parse(receipt["proof"]), data, VerifierKey.parse(receipt["vkey"]))
    for principal in (replace(PRINCIPAL, subject=SubjectId("bob")), replace(PRINCIPAL, tenant=TenantId("red"))):
        with pytest.raises(NotFoundError):
            await receipts.find("10", principal)
    for reference in ("r9999", "", "-1", "9" * 40, "../vkey", "٣"):
        with pytest.raises(NotFoundError):
            await receipts.find(reference, PRINCIPAL)
    with pytest.raises(NotFoundError):
        await receipts.find("402", PRINCIPAL)
    log = AuditLog(directory, new_signer())
    more = requests(900, 1, "alice")
    log.commit(pack_entries(more), more)
    with pytest.raises(AuditUnavailableError):  # durable, and under a published checkpoint a moment later
        await receipts.find("402", PRINCIPAL)
    log.close()
    assert (await receipts.find("r900", PRINCIPAL))["index"] == 402


def journal_entry(directory: Path, index: int) -> bytes:
    return next(entry for at, entry in entries_from(directory, index) if at == index)


def test_pruning_keeps_every_proof(directory: Path, tmp_path: Path) -> None:
    entry, receipt = new_receipt(directory, 390)
    policy = written(tmp_path, keep_days=30)
    planned = plan(directory, policy, datetime(2027, 6, 1, tzinfo=UTC))
    assert 256 < planned.minimum_index < 402
    recorded: list[dict[str, Any]] = []

    def append(fields: dict[str, Any]) -> int:
        assert all(path.exists() for path in planned.segments)  # on record before anything is gone
        recorded.append(fields)
        return 0

    prune(directory, policy, planned, append)
    assert recorded[0]["event"] == "audit:log:pruned"
    assert recorded[0]["minimum_index"] == planned.minimum_index
    assert not (directory / "tile/entries/000").exists()
    report = Verifier(directory, key=new_signer().key).verify()
    assert (report.size, report.minimum_index) == (402, planned.minimum_index)
    assert new_receipt(directory, 390) == (entry, receipt)
    verify_receipt(receipt, entry, new_signer().key)
    log = AuditLog(directory, new_signer())  # and the writer goes on
    more = [event("admin:act:performed", 1)]
    assert log.commit(pack_entries(more), more) == 402
    log.close()
    assert Verifier(directory).verify().size == 403


def test_pruned_entries_are_gone_and_a_pretended_pruning_is_found(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    journal.list_segments(copy)[0][1].unlink()
    with pytest.raises(VerificationError, match="missing from the journal"):
        Verifier(copy).verify()
    tile = copy / "tile/0/000"
    tile.write_bytes(bytes(32) + tile.read_bytes()[32:])
    (copy / "minimum-index").write_text(f"{journal.list_segments(copy)[0][0]}\n")
    with pytest.raises(VerificationError):
        Verifier(copy).verify()


def test_nothing_young_is_pruned(directory: Path, tmp_path: Path) -> None:
    planned = plan(directory, written(tmp_path, keep_days=30), datetime(2026, 11, 23, tzinfo=UTC))
    assert (planned.minimum_index, planned.segments, planned.bundles) == (0, (), ())


def written(folder: Path, **fields: Any) -> RetentionPolicy:
    path = folder / "retention.json"
    path.write_text(json.dumps({"v": 1, "reason": "works council, 2026", **fields}))
    return RetentionPolicy.load(path)


@pytest.mark.parametrize("fields", [{"keep_days": 0}, {"keep_days": "9"}, {"keep_days": 9, "more": 1}, {}])
def test_a_policy_that_is_not_written_right_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="retention policy"):
        written(tmp_path, **fields)


def test_the_command_says_what_it_would_prune(directory: Path, tmp_path: Path, capsys: Any) -> None:
    written(tmp_path, keep_days=30)
    assert main(["audit", "prune", str(directory), "--policy", str(tmp_path / "retention.json")]) == 0
    assert "0 segments" in capsys.readouterr().out


def test_what_a_receiver_has_not_got_yet_is_not_pruned(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    written(tmp_path, keep_days=30)
    segments = journal.list_segments(directory)
    planned = Plan(segments[1][0], (segments[0][1],), ())
    monkeypatch.setattr("server.commands.audit.plan", lambda *_: planned)
    cursors = directory.parent / "export"
    cursors.mkdir()
    (cursors / "fast.json").write_text(json.dumps({"index": segments[-1][0]}))
    command = ["audit", "prune", str(directory), "--policy", str(tmp_path / "retention.json")]
    assert main(command) == 0
    (cursors / "slow.json").write_text(json.dumps({"index": segments[1][0] - 1}))
    assert main([*command, "--yes"]) == 1
    assert f"up to entry {segments[1][0] - 1} only" in capsys.readouterr().err
    assert segments[0][1].exists()
