"""The offline verifier: reads a copy of a log once, streaming, and names the first entry at fault."""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import file_digest
from typing import TYPE_CHECKING

from server.audit import journal
from server.audit.checkpoint import Checkpoint, NoteError, VerifierKey, verify_checkpoint
from server.audit.entry import EntryError, parse_entry
from server.audit.journal import JournalError
from server.audit.merkle import HASH_BYTES, TILE_WIDTH, Tree, leaf_hash
from server.audit.tags import Event
from server.audit.tiles import TileError, TileReader, split_entries, tile_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, BinaryIO

    from server.audit.journal import Commit

_PROGRESS_EVERY = 4_096
_MAX_ATTEMPTS = 20
_RETRY_S = 0.05
_FILES = frozenset({"checkpoint", "vkey", "tile", "journal", "minimum-index", "cosignatures", "lock"})


class VerificationError(Exception):
    """The log is not what was signed, or can't be shown to be.

    Args:
        message: What is wrong and where.
        index: The first entry at fault; everything before it is proved good.
    """

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclass(slots=True)
class Report:
    """What a verification proved."""

    origin: str = ""
    size: int = 0
    root: bytes = b""
    minimum_index: int = 0
    num_commits: int = 0
    num_accepted: int = 0
    num_finished: int = 0
    num_refused: int = 0
    num_open: int = 0
    num_unknown: int = 0
    published: int = 0
    cosigned: int = 0
    is_pinned: bool = False
    has_journal: bool = True
    first_time: str = ""
    last_time: str = ""
    events: dict[str, int] = field(default_factory=dict)


class Verifier:
    """Verifies one log folder. Memory does not grow with the log.

    Args:
        directory: The log, or a copy of it.
        key: The pinned public key; without one the folder's own is used, which an attacker may have replaced.
        checkpoints: Checkpoints of this log that were kept elsewhere; they show a cut tail or a fork.
        witnesses: Public keys that must have cosigned `cosignatures`.
        use_journal: Whether the folder has its journal; False for a copy of tiles alone.
        on_entry: Told (index, entry) of every entry that is proved so far as a commit goes.
        on_progress: Told the index from time to time.
    """

    def __init__(
        self,
        directory: Path,
        *,
        key: VerifierKey | None = None,
        checkpoints: tuple[str, ...] = (),
        witnesses: tuple[VerifierKey, ...] = (),
        use_journal: bool = True,
        on_entry: Callable[[int, dict[str, Any]], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._directory = directory
        self._pinned = key
        self._checkpoints = checkpoints
        self._witnesses = witnesses
        self._use_journal = use_journal
        self._every_signature = True
        self._on_entry = on_entry
        self._on_progress = on_progress
        self._tree = Tree()
        self._reader = TileReader(directory)
        self._report = Report()
        self._open: set[str] = set()
        self._heads: dict[int, list[tuple[str, bytes]]] = {}
        self._leaves: list[bytes] = []
        self._bundle = bytearray()
        self._good = 0
        self._offset = 0
        self._key: VerifierKey

    def verify(self) -> Report:
        """Check everything that section 7 of the format names, in its order.

        Raises:
            VerificationError: The first thing that is wrong.
        """
        report = self._report
        try:
            self._check_names()
            self._load_key()
            self._load_heads()
            report.minimum_index = self._minimum_index()
            self._skip_pruned()
            if self._use_journal:
                self._walk_journal()
            else:
                self._walk_bundles()
            self._settle()
        except JournalError as err:
            raise VerificationError(f"{err} (offset {err.offset})", index=self._blame(err.index)) from err
        except (TileError, NoteError) as err:
            raise VerificationError(str(err), index=self._good) from err
        except OSError as err:
            raise VerificationError(f"{err.filename} can't be read: {err.strerror}.", index=self._good) from err
        except UnicodeDecodeError as err:
            raise VerificationError("A signed note is not text.", index=self._good) from err
        report.origin, report.size, report.root = self._key.name, self._tree.size, self._tree.root()
        report.num_open, report.is_pinned, report.has_journal = (
            len(self._open),
            self._pinned is not None,
            self._use_journal,
        )
        return report

    # What must be there -------------------------------------------------------------------------------------------

    def _check_names(self) -> None:
        for path in self._directory.iterdir():
            if path.name not in _FILES and not path.name.startswith("."):
                raise VerificationError(f"{path.name} does not belong in an audit log.", index=0)

    def _load_key(self) -> None:
        text = (self._directory / "vkey").read_text()
        self._key = VerifierKey.parse(text)
        if text != f"{self._key}\n":
            raise VerificationError("vkey does not end with one line break.", index=0)
        if self._pinned is not None and self._pinned != self._key:
            raise VerificationError("The log's vkey is not the pinned one.", index=0)

    def _load_heads(self) -> None:
        """Read every checkpoint that the tree must pass through."""
        published = (self._directory / "checkpoint").read_text()
        self._report.published = self._expect("checkpoint", published).size
        cosigned = self._directory / "cosignatures"
        if cosigned.exists():
            note = cosigned.read_text()
            self._report.cosigned = self._expect("cosignatures", note).size
            for witness in self._witnesses:
                verify_checkpoint(note, witness)
        elif self._witnesses:
            raise VerificationError("No witness has cosigned this log.", index=0)
        for note in self._checkpoints:
            self._expect("the checkpoint kept elsewhere", note)

    def _expect(self, what: str, note: str) -> Checkpoint:
        try:
            head = verify_checkpoint(note, self._key)
        except NoteError as err:
            raise VerificationError(f"{what}: {err}", index=0) from err
        self._heads.setdefault(head.size, []).append((what, head.root))
        if head.size == 0 and head.root != self._tree.root():
            raise VerificationError(f"{what} is empty but has another root.", index=0)
        return head

    def _minimum_index(self) -> int:
        path = self._directory / "minimum-index"
        if not path.exists():
            return 0
        text = path.read_text()
        if not text.endswith("\n") or not text[:-1].isdecimal() or str(int(text)) != text[:-1]:
            raise VerificationError("minimum-index is malformed.", index=0)
        return int(text)

    def _skip_pruned(self) -> None:
        """Take the leaf hashes of pruned entries from the tiles; a root signed later vouches for them."""
        minimum = self._report.minimum_index
        segments = journal.list_segments(self._directory) if self._use_journal else []
        start = segments[0][0] if segments else minimum - minimum % TILE_WIDTH
        if start > minimum:
            raise VerificationError(f"Entries {minimum} to {start - 1} are missing from the journal.", index=minimum)
        for index in range(0, start, TILE_WIDTH):
            width = min(TILE_WIDTH, start - index)
            for leaf in self._reader.hashes(0, index // TILE_WIDTH, width):
                self._append(leaf)
            self._bundle.clear()
            if width < TILE_WIDTH:
                for entry in self._reader.entries(index // TILE_WIDTH, width):
                    self._bundle += len(entry).to_bytes(2, "big") + entry
        self._good = start

    # The walk -----------------------------------------------------------------------------------------------------

    def _walk_journal(self) -> None:
        segments = journal.list_segments(self._directory)
        if not segments:
            raise VerificationError("The journal is missing; a copy of tiles alone needs --no-journal.", index=0)
        for number, (first, path) in enumerate(segments):
            if first != self._tree.size:
                raise VerificationError(
                    f"{path.name} begins at entry {first}, expected {self._tree.size}.",
                    index=min(first, self._tree.size),
                )
            sealed = self._sealed_digest(segments[number + 1]) if number + 1 < len(segments) else None
            with path.open("rb") as file:
                is_sealed = sealed is not None and file_digest(file, "sha256").hexdigest() == sealed
                self._every_signature = not is_sealed
                file.seek(0)
                self._offset = journal.read_segment_line(file, self._key.name, first)
                try:
                    self._walk_segment(file)
                except JournalError:
                    if number + 1 < len(segments) or self._tree.size != self._good or not self._is_live():
                        raise
                    time.sleep(_RETRY_S)  # a commit that was being written while it was read; `_settle` reads on
                if number + 1 < len(segments) and (self._tree.size == first or file.seek(0, 2) != self._offset):
                    raise VerificationError(f"{path.name} does not end with a commit.", index=self._tree.size)
                if sealed is not None and not is_sealed:
                    raise VerificationError(f"{path.name} is not what the next segment says of it.", index=first)

    def _sealed_digest(self, following: tuple[int, Path]) -> str | None:
        """Return what the next segment's first entry says of this one.

        That entry is in the tree and so signed, as its own turn will show: where the digest fits, every byte of this
        segment is vouched for, its signatures too, and the last of them is enough.
        """
        first, path = following
        with path.open("rb") as file:
            try:
                journal.read_segment_line(file, self._key.name, first)
                commit = next(journal.read_commits(file, first), None)
                entry = parse_entry(split_entries(commit.entries)[0]) if commit is not None else {}
            except (JournalError, TileError, EntryError, IndexError):
                return None
        digest = entry.get("previous_sha256") if entry.get("event") == Event.SEGMENT_OPENED else None
        return digest if isinstance(digest, str) else None

    def _walk_segment(self, file: BinaryIO) -> None:
        file.seek(self._offset)
        last: Commit | None = None
        for commit in journal.read_commits(file, self._tree.size):
            self._check_commit(commit)
            last = commit
        if last is not None and not self._every_signature:
            self._check_signature(last)

    def _settle(self) -> None:
        """Check the ends; a log that is being written may have grown past what was read, so read on and look again.

        A busy writer can outrun every look. Then what was read is verified, commit by commit, and only the newest tiles
        are left uncompared; a copy of a log, which no writer holds, gets no such grace.
        """
        for attempt in range(_MAX_ATTEMPTS):
            try:
                self._check_ends()
            except (VerificationError, FileNotFoundError) as err:
                moved_on = isinstance(err, FileNotFoundError) and self._is_live()
                if not self._use_journal or not (self._read_on() or moved_on):
                    raise
                if attempt + 1 == _MAX_ATTEMPTS and not self._is_live():
                    raise
            else:
                return

    def _read_on(self) -> bool:
        """Read what the journal got since; return whether there was anything."""
        before = self._tree.size
        segments = journal.list_segments(self._directory)
        for number, (first, path) in enumerate(segments):
            if first > self._tree.size:
                break
            if number + 1 < len(segments) and segments[number + 1][0] <= self._tree.size:
                continue  # read to its end
            with path.open("rb") as file:
                if first == self._tree.size:
                    self._offset = journal.read_segment_line(file, self._key.name, first)
                try:
                    self._walk_segment(file)
                except JournalError:
                    if self._tree.size != self._good or not self._is_live():
                        raise
                    time.sleep(_RETRY_S)
        return self._tree.size > before

    def _is_live(self) -> bool:
        """Whether a writer holds the log, so that its end may be caught half written."""
        try:
            with (self._directory / "lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _check_commit(self, commit: Commit) -> None:
        entries = split_entries(commit.entries)
        if len(entries) != commit.count:
            raise JournalError("A commit's count is wrong.", index=commit.first, offset=commit.offset)
        for entry in entries:
            self._add(entry)
        head = Checkpoint(self._key.name, self._tree.size, self._tree.root())
        if not commit.note.startswith(head.text().encode() + b"\n"):
            raise JournalError("A commit's root is not that of its entries.", index=commit.first, offset=commit.offset)
        if self._every_signature:
            self._check_signature(commit)
        # What an entry says counts once it is proved to be the one that was signed: so the first bad one is named.
        for index, entry in enumerate(entries, commit.first):
            self._check_entry(index, entry)
        self._good, self._offset = self._tree.size, commit.end
        self._report.num_commits += 1

    def _check_signature(self, commit: Commit) -> None:
        try:
            verify_checkpoint(commit.note.decode(), self._key)
        except (NoteError, UnicodeDecodeError) as err:
            raise JournalError(f"A commit's checkpoint: {err}", index=commit.first, offset=commit.offset) from err

    def _check_entry(self, index: int, data: bytes) -> None:
        try:
            entry = parse_entry(data)
        except EntryError as err:
            raise VerificationError(str(err), index=index) from err
        self._follow(index, entry)
        if self._on_entry is not None:
            self._on_entry(index, entry)
        if self._on_progress is not None and index % _PROGRESS_EVERY == 0:
            self._on_progress(index)

    def _add(self, data: bytes) -> None:
        self._bundle += len(data).to_bytes(2, "big") + data
        self._append(leaf_hash(data))

    def _follow(self, index: int, entry: dict[str, Any]) -> None:
        """Hold every request to one accepted and one finished entry."""
        report, event = self._report, entry["event"]
        report.events[event] = report.events.get(event, 0) + 1
        report.first_time = report.first_time or entry["time"]
        report.last_time = entry["time"]
        if event == Event.REQUEST_ACCEPTED:
            if entry["request_id"] in self._open:
                raise VerificationError(f"Request {entry['request_id']} is accepted twice.", index=index)
            self._open.add(entry["request_id"])
            report.num_accepted += 1
        elif event == Event.REQUEST_FINISHED:
            if entry["request_id"] not in self._open and not report.minimum_index:
                raise VerificationError(f"Request {entry['request_id']} is finished but not open.", index=index)
            self._open.discard(entry["request_id"])
            report.num_finished += 1
            report.num_unknown += entry["outcome"] == "unknown"
        elif event in (Event.REQUEST_REFUSED, Event.CREDENTIAL_REFUSED):
            report.num_refused += 1

    def _append(self, leaf: bytes) -> None:
        """Add a leaf; where it fills a tile or meets a checkpoint, compare."""
        tree = self._tree
        tree.append(leaf)
        self._leaves.append(leaf)
        if tree.size in self._heads:
            root = tree.root()
            for what, expected in self._heads[tree.size]:
                if root != expected:
                    raise VerificationError(
                        f"The log conflicts with {what} at {tree.size} entries: one of them is forged.",
                        index=self._good,
                    )
        if tree.size % TILE_WIDTH == 0:
            self._compare_bundle(tree.size // TILE_WIDTH - 1, TILE_WIDTH)
            for level, index, hashes in tree.take_full_tiles():
                self._compare_tile(level, index, hashes)
            self._leaves.clear()
            self._bundle.clear()

    def _walk_bundles(self) -> None:
        """Verify a copy without its journal: the published checkpoint is all that vouches for it."""
        size = self._report.published
        while self._tree.size < size:
            index = self._tree.size // TILE_WIDTH
            width = min(TILE_WIDTH, size - index * TILE_WIDTH)
            leaves = self._reader.hashes(0, index, width)
            for offset, data in enumerate(self._reader.entries(index, width)):
                if leaf_hash(data) != leaves[offset]:
                    raise VerificationError("An entry is not the one whose hash the tile holds.", index=self._tree.size)
                self._check_entry(self._tree.size, data)
                self._add(data)
            self._good = self._tree.size

    # Tiles --------------------------------------------------------------------------------------------------------

    def _compare_tile(self, level: int, index: int, hashes: list[bytes]) -> None:
        self._compare(level, index, b"".join(hashes), HASH_BYTES, len(hashes))

    def _compare_bundle(self, index: int, width: int) -> None:
        if (index + 1) * TILE_WIDTH > self._report.minimum_index:
            self._compare(None, index, bytes(self._bundle), 0, width)

    def _compare(self, level: int | None, index: int, data: bytes, unit_bytes: int, width: int) -> None:
        """Compare a tile with what the entries make of it, and every partial one that lies beside it."""
        path = self._directory / tile_path(level, index)
        is_full = width == TILE_WIDTH
        published = self._report.published
        span = TILE_WIDTH ** ((level or 0) + 1)
        if is_full and (path.exists() or (index + 1) * span <= published):
            self._compare_file(path, data, level, index, unit_bytes)
        elif not is_full and path.exists():
            raise VerificationError(
                f"{tile_path(level, index)} holds more than the log.", index=min(self._tree.size, index * span)
            )
        folder = path.with_name(path.name + ".p")
        with suppress(FileNotFoundError):  # a live log drops the folder once its full tile is durable
            for partial in folder.iterdir():
                if partial.name.startswith("."):
                    continue
                found = int(partial.name) if partial.name.isdecimal() else 0
                if not 1 <= found <= width:
                    name = partial.relative_to(self._directory)
                    raise VerificationError(f"{name} does not belong.", index=self._good)
                self._compare_file(partial, self._prefix(data, found, unit_bytes), level, index, unit_bytes)
        if not is_full and (need := (published >> (8 * (level or 0))) - index * TILE_WIDTH) > 0:
            partial = folder / str(need)
            self._compare_file(partial, self._prefix(data, need, unit_bytes), level, index, unit_bytes)

    @staticmethod
    def _prefix(data: bytes, width: int, unit_bytes: int) -> bytes:
        if unit_bytes:
            return data[: width * unit_bytes]
        at = 0
        for _ in range(width):
            at += 2 + (data[at] << 8 | data[at + 1])
        return data[:at]

    def _compare_file(self, path: Path, expected: bytes, level: int | None, index: int, unit_bytes: int) -> None:
        found = path.read_bytes()
        if found == expected:
            return
        at = next(
            (at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        if unit_bytes:
            first = (index * TILE_WIDTH + at // unit_bytes) * TILE_WIDTH ** (level or 0)
        else:
            first, end = index * TILE_WIDTH, 0
            while end + 2 <= len(expected):
                end += 2 + (expected[end] << 8 | expected[end + 1])
                if at < end:
                    break
                first += 1
        raise VerificationError(
            f"{path.relative_to(self._directory)} differs from the journal.", index=min(first, self._tree.size)
        )

    def _check_ends(self) -> None:
        size = self._tree.size
        for head, expected in self._heads.items():
            if head > size:
                raise VerificationError(
                    f"The log has {size} entries, {expected[0][0]} says {head}: its tail was cut off.", index=size
                )
        if size % TILE_WIDTH:
            self._compare_bundle(size // TILE_WIDTH, size % TILE_WIDTH)
        for level, index, hashes in self._tree.open_tiles():
            self._compare_tile(level, index, hashes)
        self._check_strays()

    def _check_strays(self) -> None:
        """No tile may lie there that no entry accounts for."""
        size, root = self._tree.size, self._directory / "tile"
        for path in root.rglob("*") if root.is_dir() else ():
            if path.is_dir() or path.name.startswith("."):
                continue
            level_name, *parts = path.relative_to(root).parts
            is_partial = len(parts) > 1 and parts[-2].endswith(".p")
            digits = [part.removesuffix(".p").removeprefix("x") for part in (parts[:-1] if is_partial else parts)]
            level = 0 if level_name == "entries" else int(level_name) if level_name.isdecimal() else -1
            if level < 0 or not digits or not all(part.isdecimal() and len(part) == 3 for part in digits):
                raise VerificationError(f"{path.relative_to(self._directory)} does not belong in a log.", index=size)
            first = int("".join(digits)) * TILE_WIDTH ** (level + 1)
            if first >= size:
                raise VerificationError(f"{path.relative_to(self._directory)} is beyond the log's end.", index=size)

    def _blame(self, index: int) -> int:
        """Return the entry at fault in the damaged commit that begins at `index`, by the tiles if they stand."""
        try:
            path = [path for first, path in journal.list_segments(self._directory) if first <= index][-1]
            with path.open("rb") as file:
                file.seek(self._offset_of(index, path))
                entries = journal.read_damaged_entries(file)
            for at, entry in enumerate(entries, index):
                if leaf_hash(entry) != self._reader.hashes(0, at // TILE_WIDTH, at % TILE_WIDTH + 1)[-1]:
                    return at
        except (JournalError, TileError, OSError, IndexError):
            return index
        return index

    def _offset_of(self, index: int, path: Path) -> int:
        return self._offset if self._good == index else path.stat().st_size


def describe(report: Report) -> dict[str, object]:
    """Return a report as JSON-ready values."""
    values: dict[str, object] = {name: getattr(report, name) for name in Report.__slots__}
    values["root"] = report.root.hex()
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]
