"""Every change to a log is found, and the first bad entry is named: by our verifier, and by Go's for each kind."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from server.audit import journal
from server.audit.log import AuditLog
from server.audit.merkle import leaf_hash
from server.audit.tiles import pack_entries, split_entries
from server.audit.verify import VerificationError, Verifier
from tests.unit.audit.audit_kit import make_log, new_signer, request_pair
from tests.vectors.audit.go import build_go

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 300
GROUP = 20
KEY = new_signer().key
KINDS = ("flip", "insert", "delete", "swap", "truncate", "rewrite", "roll back", "fork")


@dataclass
class Tampered:
    """A change that was made, and the entries that may be named: [low, high]."""

    what: str
    low: int
    high: int


class Bench:
    """One good log that is changed and put back again and again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_log(directory, SIZE, group=GROUP)
        (directory / "lock").unlink()
        self.good = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        self.paths = sorted(self.good)
        self.journal = journal.list_segments(directory)[0][1]
        with self.journal.open("rb") as file:
            file.readline()
            self.commits = list(journal.read_commits(file, 0))
        self.kept = (directory / "checkpoint").read_text()

    def restore(self) -> None:
        for path in self.directory.rglob("*"):
            if path.is_file() and path not in self.good:
                path.unlink()
        for path, data in self.good.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def check(self) -> VerificationError | None:
        try:
            Verifier(self.directory, key=KEY, checkpoints=(self.kept,)).verify()
        except VerificationError as err:
            return err
        return None

    def bad_entries(self, path: Path, offset: int) -> tuple[int, int]:
        """Return the least and greatest index that a change of this byte may be blamed on."""
        name = path.relative_to(self.directory).as_posix()
        if path == self.journal:
            for commit in self.commits:
                if offset < commit.end:
                    start = commit.end - 4 - len(commit.note) - len(commit.entries)
                    if offset < commit.offset:
                        return 0, 0
                    if start <= offset < start + len(commit.entries):
                        index = commit.first + entry_at(commit.entries, offset - start)
                        return index, index
                    return commit.first, commit.first + commit.count
        if name.startswith("tile/entries/"):
            index = 256 * (name != "tile/entries/000") + entry_at(self.good[path], offset)
            return index, index
        if name.startswith("tile/0/"):
            index = 256 * (name != "tile/0/000") + offset // 32
            return index, index
        return 0, SIZE


def entry_at(packed: bytes, offset: int) -> int:
    """Return the number of the packed entry that holds a byte."""
    end = 0
    for number, entry in enumerate(split_entries(packed)):
        end += 2 + len(entry)
        if offset < end:
            return number
    raise AssertionError(offset)


def refit(commit: journal.Commit, entries: list[bytes]) -> bytes:
    """Put other entries into a commit as somebody without the signing key can: lengths and checksum right."""
    return journal.encode_commit(commit.first, len(entries), pack_entries(entries), commit.note)


def flip(bench: Bench, rng: random.Random) -> Tampered:
    path = rng.choice(bench.paths)
    data = bytearray(bench.good[path])
    offset = rng.randrange(len(data))
    data[offset] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return Tampered(f"flip {path} at {offset}", *bench.bad_entries(path, offset))


def truncate(bench: Bench, rng: random.Random) -> Tampered:
    path = rng.choice([path for path in bench.paths if bench.good[path]])
    offset = rng.randrange(len(bench.good[path]))
    os.truncate(path, offset)
    low, high = bench.bad_entries(path, offset)
    if path == bench.journal:  # the commit that lost its end is the first that is bad
        low, high = next((c.first, c.first + c.count) for c in bench.commits if offset < c.end)
    return Tampered(f"truncate {path} to {offset}", low, high)


def insert(bench: Bench, rng: random.Random) -> Tampered:
    if rng.random() < 0.5:
        path = rng.choice(bench.paths)
        data = bench.good[path]
        offset = rng.randrange(len(data) + 1)
        more = rng.randbytes(rng.randint(1, 64))
        path.write_bytes(data[:offset] + more + data[offset:])
        return Tampered(f"insert {len(more)} bytes into {path} at {offset}", 0, SIZE)
    commit = rng.choice(bench.commits)
    entries = split_entries(commit.entries)
    at = rng.randrange(len(entries) + 1)
    entries.insert(at, request_pair(rng.randrange(10**6, 10**7))[0])
    write_commit(bench, commit, refit(commit, entries))
    # Nothing of the commit itself is wrong before the inserted entry, so it is blamed; at the very end, the root is.
    return Tampered(f"insert an entry at {commit.first + at}", commit.first, commit.first + at)


def delete(bench: Bench, rng: random.Random) -> Tampered:
    way = rng.randrange(3)
    if way == 0:
        path = rng.choice(bench.paths)
        path.unlink()
        return Tampered(f"delete {path}", 0, SIZE)
    commit = rng.choice(bench.commits)
    if way == 1:
        write_commit(bench, commit, b"")
        return Tampered(f"delete the commit at {commit.first}", commit.first, commit.first + commit.count)
    entries = split_entries(commit.entries)
    at = rng.randrange(len(entries))
    del entries[at]
    write_commit(bench, commit, refit(commit, entries))
    return Tampered(f"delete entry {commit.first + at}", commit.first, commit.first + at)


def swap(bench: Bench, rng: random.Random) -> Tampered:
    if rng.random() < 0.3:
        first, second = sorted(rng.sample(bench.commits, 2), key=lambda commit: commit.first)
        data = bench.good[bench.journal]
        bench.journal.write_bytes(
            data[: first.offset]
            + data[second.offset : second.end]
            + data[first.end : second.offset]
            + data[first.offset : first.end]
            + data[second.end :]
        )
        return Tampered(f"swap commits {first.first} and {second.first}", first.first, first.first)
    commit = rng.choice(bench.commits)
    entries = split_entries(commit.entries)
    first_at, second_at = sorted(rng.sample(range(len(entries)), 2))
    entries[first_at], entries[second_at] = entries[second_at], entries[first_at]
    write_commit(bench, commit, refit(commit, entries))
    return Tampered(f"swap entries in {commit.first}", commit.first, commit.first + first_at)


def rewrite(bench: Bench, rng: random.Random) -> Tampered:
    """Change one entry wherever it stands: journal, bundle and leaf hash, all lengths and checksums right."""
    commit = rng.choice(bench.commits)
    entries = split_entries(commit.entries)
    at = rng.randrange(len(entries))
    index = commit.first + at
    old = entries[at]
    new = old.replace(b"req-", b"qer-")
    entries[at] = new
    write_commit(bench, commit, refit(commit, entries))
    for path in bench.paths:
        name = path.relative_to(bench.directory).as_posix()
        if name.startswith("tile/entries/"):
            path.write_bytes(bench.good[path].replace(old, new))
        elif name.startswith("tile/0/"):
            path.write_bytes(bench.good[path].replace(leaf_hash(old), leaf_hash(new)))
    return Tampered(f"rewrite entry {index} everywhere", commit.first, index)


def roll_back(bench: Bench, rng: random.Random) -> Tampered:
    size = rng.randrange(1, SIZE)
    shutil.rmtree(bench.directory)
    make_log(bench.directory, size - size % GROUP or GROUP, group=GROUP)
    size = size - size % GROUP or GROUP
    return Tampered(f"roll back to {size}", size, size)


def fork(bench: Bench, rng: random.Random) -> Tampered:
    """Sign another history with the log's own key, of the same length."""
    at = rng.randrange(SIZE // 2)
    shutil.rmtree(bench.directory)
    log = AuditLog(bench.directory, new_signer())
    pairs = [request_pair(number if number != at else number + 1_000_000) for number in range(SIZE // 2)]
    entries = [entry for pair in pairs for entry in pair]
    for start in range(0, SIZE, GROUP):
        log.commit(pack_entries(entries[start : start + GROUP]), entries[start : start + GROUP])
    log.close()
    return Tampered(f"fork at {2 * at}", 0, SIZE)


def write_commit(bench: Bench, commit: journal.Commit, new: bytes) -> None:
    data = bench.good[bench.journal]
    bench.journal.write_bytes(data[: commit.offset] + new + data[commit.end :])


ATTACKS: dict[str, Callable[[Bench, random.Random], Tampered]] = dict(
    zip(KINDS, (flip, insert, delete, swap, truncate, rewrite, roll_back, fork), strict=True)
)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Nothing here is about durability, and the attacks make hundreds of logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _descriptor: None)
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("tamper") / "audit")


def campaign(bench: Bench, seed: int, rounds: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - a seeded campaign
    for number in range(rounds):
        # Making another log is slow, so the two attacks that need one come less often.
        kind = rng.choice(KINDS[:6]) if number % 20 else KINDS[6 + number // 20 % 2]
        tampered = ATTACKS[kind](bench, rng)
        error = bench.check()
        assert error is not None, f"round {number}: not found: {tampered.what}"
        assert tampered.low <= error.index <= tampered.high, f"round {number}: {tampered} but {error.index}: {error}"
        bench.restore()
    assert bench.check() is None


def test_a_thousand_changes_are_found_and_named(bench: Bench) -> None:
    campaign(bench, 8, 1_000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_changes_are_found_and_named(bench: Bench) -> None:
    campaign(bench, 10_000, 10_000)


@pytest.mark.parametrize("kind", KINDS)
def test_go_finds_a_sample_of_each_kind(bench: Bench, kind: str, tmp_path: Path) -> None:
    gocheck = build_go("gocheck")
    kept = tmp_path / "kept"
    kept.write_text(bench.kept)
    command = [str(gocheck), str(KEY), str(bench.directory), str(kept)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith(f"OK {SIZE} ")
    rng = random.Random(1)  # noqa: S311 - a seeded campaign
    found = 0
    while found < 4:
        tampered = ATTACKS[kind](bench, rng)
        # Go reads what is published; what was done to the journal is carried over, as an attacker would.
        published = [path for path in bench.paths if path not in (bench.journal, bench.directory / "vkey")]
        if all(path.exists() and path.read_bytes() == bench.good[path] for path in published) and not spread(bench):
            assert bench.check() is not None
            bench.restore()
            continue
        # Go follows the full tile and the newest partial one, as every client of the format does.
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout[:3]) == (1, "BAD"), f"{tampered.what}: {result.stdout}"
        assert bench.check() is not None
        bench.restore()
        found += 1


def spread(bench: Bench) -> bool:
    """Carry what an attack did to the journal's entries over to the bundles; return whether that changed one."""
    data = bench.journal.read_bytes() if bench.journal.exists() else b"\n"
    at = data.find(b"\n") + 1
    entries: list[bytes] = []
    while at + 22 <= len(data):
        _, _, count, entries_bytes, note_bytes = struct.unpack_from(">4sQIIH", data, at)
        try:
            entries += split_entries(data[at + 22 : at + 22 + entries_bytes])[:count]
        except ValueError:
            break
        at += 22 + entries_bytes + note_bytes + 4
    if not entries:
        return False
    bundles = {"000": pack_entries(entries[:256]), f"001.p/{SIZE - 256}": pack_entries(entries[256:SIZE])}
    changed = False
    for name, bundle in bundles.items():
        path = bench.directory / "tile/entries" / name
        changed |= bundle != bench.good[path]
        path.write_bytes(bundle)
    return changed


def test_crc_is_not_what_protects_the_log(bench: Bench) -> None:
    data = bytearray(bench.good[bench.journal])
    commit = bench.commits[3]
    data[commit.offset + 60] ^= 1
    data[commit.end - 4 : commit.end] = struct.pack(">I", zlib.crc32(bytes(data[commit.offset : commit.end - 4])))
    bench.journal.write_bytes(data)
    error = bench.check()
    bench.restore()
    assert error is not None
    assert commit.first <= error.index < commit.first + commit.count
