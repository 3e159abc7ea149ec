"""The log on disk: commits, tiles, rotation, recovery, refusals."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from server.audit import journal
from server.audit.log import AuditLog
from server.audit.merkle import leaf_hash, subtree_hash
from server.audit.tail import Cursor
from server.audit.tiles import TileReader, pack_entries
from server.audit.verify import Verifier
from server.errors import AuditLogError
from tests.unit.audit.audit_kit import event, fill, make_log, new_signer

if TYPE_CHECKING:
    from pathlib import Path


def last_segment(directory: Path) -> Path:
    return journal.list_segments(directory)[-1][1]


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 511, 512, 700])
def test_log_verifies_and_reopens(tmp_path: Path, size: int) -> None:
    key = make_log(tmp_path, size)
    report = Verifier(tmp_path, key=key).verify()
    assert (report.size, report.num_open) == (size, 0)
    log = AuditLog(tmp_path, new_signer())
    assert (log.tree.size, log.cut_bytes, log.rebuilt_tiles) == (size, 0, 0)
    fill(log, 3)
    log.close()
    report = Verifier(tmp_path, key=key).verify()
    assert (report.size, report.num_open) == (size + 3, 0)


def test_the_example_of_the_tile_specification(tmp_path: Path) -> None:
    signer = new_signer()
    log = AuditLog(tmp_path, signer)
    entry = event("admin:act:performed", 1)
    for _ in range(70):
        log.commit(pack_entries([entry] * 1000), [entry] * 1000)
        log.publish()
    log.close()
    root = tmp_path / "tile"
    full = [path for path in (root / "0").rglob("*") if path.is_file() and ".p" not in str(path.parent)]
    assert len(full) == 273
    assert [path.name for path in (root / "0").rglob("273.p/*")][-1] == "112"
    assert (root / "1/000").stat().st_size == 8192
    assert (root / "1/001.p/17").stat().st_size == 17 * 32
    assert (root / "2/000.p/1").stat().st_size == 32
    assert TileReader(tmp_path).root(70_000) == subtree_hash([leaf_hash(entry)] * 70_000)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, new_signer())
    with pytest.raises(AuditLogError, match="Another writer"):
        AuditLog(tmp_path, new_signer())
    log.close()


def test_another_key_is_refused(tmp_path: Path) -> None:
    make_log(tmp_path, 4)
    with pytest.raises(AuditLogError, match="another key"):
        AuditLog(tmp_path, new_signer("other"))


@pytest.mark.parametrize("cut", [1, 3, 4, 21, 22, 23, 100])
def test_a_torn_last_commit_is_cut(tmp_path: Path, cut: int) -> None:
    log = AuditLog(tmp_path, new_signer())
    fill(log, 20)
    entry = event("admin:act:performed", 99)
    log.commit(pack_entries([entry]), [entry])
    log.release()  # a kill: the last commit is not published
    path = last_segment(tmp_path)
    end = len(path.read_bytes().rstrip(b"\x00"))
    os.truncate(path, end - cut)
    if cut % 2:
        os.truncate(path, end + 4096)  # the file system may leave zeros where a write did not arrive
    log = AuditLog(tmp_path, new_signer())
    assert log.tree.size == 20
    assert log.cut_bytes > 0
    log.close()
    assert Verifier(tmp_path).verify().size == 20


def test_zeros_after_the_last_commit_are_room(tmp_path: Path) -> None:
    make_log(tmp_path, 20)
    with last_segment(tmp_path).open("ab") as file:
        file.write(bytes(5000))
    log = AuditLog(tmp_path, new_signer())
    assert (log.tree.size, log.cut_bytes) == (20, 0)
    log.close()


def test_a_published_commit_is_never_cut(tmp_path: Path) -> None:
    make_log(tmp_path, 20)
    path = last_segment(tmp_path)
    os.truncate(path, path.stat().st_size - 5)
    before = path.read_bytes()
    with pytest.raises(AuditLogError, match="cut short"):
        AuditLog(tmp_path, new_signer())
    assert path.read_bytes() == before


def test_damage_before_the_end_is_refused(tmp_path: Path) -> None:
    make_log(tmp_path, 40)
    path = last_segment(tmp_path)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(AuditLogError, match="checksum"):
        AuditLog(tmp_path, new_signer())


def test_a_missing_journal_or_tail_is_refused(tmp_path: Path) -> None:
    make_log(tmp_path / "a", 40)
    shutil.rmtree(tmp_path / "a" / "journal")
    with pytest.raises(AuditLogError, match="journal is gone"):
        AuditLog(tmp_path / "a", new_signer())
    make_log(tmp_path / "b", 40)
    with last_segment(tmp_path / "b").open("rb") as file:
        journal.read_segment_line(file, new_signer().key.name, 0)
        commits = list(journal.read_commits(file, 0))
    os.truncate(last_segment(tmp_path / "b"), commits[-1].offset)
    with pytest.raises(AuditLogError, match="tail was cut off"):
        AuditLog(tmp_path / "b", new_signer())


def test_torn_tiles_are_rebuilt_and_changed_ones_refused(tmp_path: Path) -> None:
    key = make_log(tmp_path, 600)
    bundle, tile = tmp_path / "tile/entries/000", tmp_path / "tile/0/001"
    whole = tile.read_bytes()
    bundle.write_bytes(b"")
    tile.write_bytes(whole[:64] + bytes(len(whole) - 64))
    log = AuditLog(tmp_path, new_signer())
    assert log.rebuilt_tiles == 2
    log.close()
    assert Verifier(tmp_path, key=key).verify().size == 600
    tile.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(AuditLogError, match="tile/0/001"):
        AuditLog(tmp_path, new_signer())


def test_segments_rotate_and_only_the_last_is_replayed(tmp_path: Path) -> None:
    key = make_log(tmp_path, 1000, segment_bytes=20_000)
    segments = journal.list_segments(tmp_path)
    assert len(segments) > 3
    assert Verifier(tmp_path, key=key).verify().size == 1000
    seen: list[bytes] = []
    log = AuditLog(tmp_path, new_signer(), on_entry=seen.append)
    assert log.tree.size == 1000
    assert len(seen) == 1000 - segments[-1][0]
    log.close()


def test_an_empty_last_segment_is_dropped(tmp_path: Path) -> None:
    make_log(tmp_path, 100, segment_bytes=5_000)
    log = AuditLog(tmp_path, new_signer(), segment_bytes=5_000)
    log.rotate()
    log.release()
    log = AuditLog(tmp_path, new_signer())
    assert log.tree.size == 100
    log.close()
    assert Verifier(tmp_path).verify().size == 100


def test_an_unpublished_log_is_published_at_the_next_start(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, new_signer())
    entries = [event("admin:act:performed", number) for number in range(300)]
    log.commit(pack_entries(entries), entries)
    log.release()
    AuditLog(tmp_path, new_signer()).close()
    report = Verifier(tmp_path).verify()
    assert (report.size, report.published) == (300, 300)


def test_a_failed_sync_is_not_tried_again_on_the_same_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    log = AuditLog(tmp_path, new_signer(), clock=lambda: now_s[0])
    fill(log, 10)
    entry = event("admin:act:performed", 1)
    real, calls = os.fdatasync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match="Input/output"):
        log.commit(pack_entries([entry]), [entry])
    assert log.tree.size == 10
    with pytest.raises(OSError, match="a moment ago"):
        log.commit(pack_entries([entry]), [entry])
    assert len(calls) == 1
    monkeypatch.setattr(os, "fdatasync", real)
    now_s[0] = 10.0
    assert log.commit(pack_entries([entry]), [entry]) == 10
    log.close()
    report = Verifier(tmp_path).verify()
    assert report.size == 11


def test_a_full_disk_leaves_half_a_commit_that_is_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, writes = [0.0], list[int]()
    log = AuditLog(tmp_path, new_signer(), clock=lambda: now_s[0])
    fill(log, 10)
    entry = event("admin:act:performed", 1)
    real = os.pwrite

    def short(descriptor: int, data: bytes, offset: int) -> int:
        writes.append(len(data))
        if len(writes) == 1:
            return real(descriptor, bytes(data[:30]), offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="No space"):
        log.commit(pack_entries([entry]), [entry])
    monkeypatch.setattr(os, "pwrite", real)
    now_s[0] = 1.0
    assert log.commit(pack_entries([entry]), [entry]) == 10
    log.close()
    assert Verifier(tmp_path).verify().size == 11


def test_a_disk_that_lost_the_last_commit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    log = AuditLog(tmp_path, new_signer(), clock=lambda: now_s[0])
    fill(log, 10)
    entry = event("admin:act:performed", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            log.commit(pack_entries([entry]), [entry])
    path = last_segment(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data.rstrip(b"\x00")) - 500] ^= 1  # the page came back from the disk without the last commit
    path.write_bytes(data)
    now_s[0] = 10.0
    with pytest.raises(OSError, match="read back"):
        log.commit(pack_entries([entry]), [entry])
    log.release()


def test_a_reader_slower_than_the_writer_finds_no_damage(tmp_path: Path) -> None:
    """While the reader works on what it read ahead, the writer goes on behind it, time after time."""
    log = AuditLog(tmp_path / "audit", new_signer())
    entries = [event("admin:act:performed", number) for number in range(60)]
    for entry in entries[:3]:
        log.commit(pack_entries([entry]), [entry])
    number, found = 3, []
    for _, commit in Cursor(tmp_path / "audit").read():
        found.append(commit.first)
        for entry in entries[number : number + 1]:
            log.commit(pack_entries([entry]), [entry])
        number += 1
    assert found == list(range(60))
    log.close()
