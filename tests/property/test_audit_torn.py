"""Whatever part of the last write reached the disk, recovery finds the log as it was before it, or with it whole."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from server.audit import journal
from server.audit.entry import EntryError, clean_text, encode_entry, parse_entry
from server.audit.log import AuditLog
from server.audit.tiles import TileError, pack_entries, split_entries
from server.audit.verify import Verifier
from tests.unit.audit.audit_kit import event, fill, new_signer

if TYPE_CHECKING:
    from pathlib import Path


def test_every_cut_of_the_last_commit_recovers(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    log = AuditLog(directory, new_signer(), reserve_bytes=0)
    fill(log, 20)
    before = log.tree.root()
    last = [event("admin:act:performed", number) for number in range(9)]
    log.commit(pack_entries(last), last)
    after = log.tree.root()
    log.release()
    path = journal.list_segments(directory)[0][1]
    whole = path.read_bytes()
    with path.open("rb") as file:
        file.readline()
        commit = list(journal.read_commits(file, 0))[-1]
    rng = random.Random(5)  # noqa: S311 - a seeded campaign
    for number in range(200):
        torn = bytearray(whole)
        if number % 2:  # cut short
            del torn[rng.randrange(commit.offset, len(whole)) :]
        else:  # sectors that never arrived
            for start in range(commit.offset - commit.offset % 128, len(whole), 128):
                if rng.random() < 0.5:
                    for at in range(max(start, commit.offset), min(start + 128, len(whole))):
                        torn[at] = 0
        path.write_bytes(torn)
        log = AuditLog(directory, new_signer(), reserve_bytes=0)
        assert (log.tree.size, log.tree.root()) in {(20, before), (29, after)}
        assert (log.tree.size == 29) == (bytes(torn) == whole)
        entry = event("admin:act:performed", 99)
        assert log.commit(pack_entries([entry]), [entry]) == log.tree.size - 1
        log.release()
        (directory / "checkpoint").unlink()  # the next round tears a commit that this recovery has published
        for tile in (directory / "tile").rglob("*"):
            if tile.is_file():
                tile.unlink()
    AuditLog(directory, new_signer()).close()
    assert Verifier(directory).verify().size >= 20


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=1_100),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True), VALUES, max_size=6))
def test_every_entry_is_one_canonical_line(fields: dict[str, object]) -> None:
    entry = {**fields, "v": 1, "event": "admin:act:performed", "time": "t"}
    data = encode_entry(entry)
    assert data.decode().isprintable()
    assert len(data) <= 65_535
    assert encode_entry(parse_entry(data)) == data


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_parsers_refuse_or_return(data: bytes) -> None:
    for parse in (parse_entry, split_entries):
        try:
            parse(data)
        except (EntryError, TileError):
            continue


@given(st.text(max_size=3_000), st.integers(1, 1_024))
def test_cleaned_text_is_bounded_and_stays_clean(text: str, limit: int) -> None:
    cleaned = clean_text(text, limit)
    assert len(cleaned) <= limit
    assert cleaned.isprintable()
    assert clean_text(cleaned, limit) == cleaned
