"""The log on disk: commits a batch with one fdatasync, recovers after a crash, publishes tiles."""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from collections import deque
from hashlib import sha256
from typing import TYPE_CHECKING

from server.audit import journal
from server.audit.checkpoint import Checkpoint, CheckpointSigner, NoteError, VerifierKey, verify_checkpoint
from server.audit.journal import JournalError
from server.audit.merkle import TILE_WIDTH, Tree, leaf_hash
from server.audit.tiles import TileError, TileReader, split_entries, tile_path
from server.errors import AuditLogError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.audit.checkpoint import Signer
    from server.audit.journal import Commit

SEGMENT_BYTES = 64 * 1024 * 1024
# A commit overwrites zeros that are on the disk already, so that its fdatasync changes no metadata: it waits for no
# file system journal and so for nobody else's files (measured beside a busy neighbour: 0.1 ms against 2.8 ms).
RESERVE_BYTES = 4 * 1024 * 1024
RETRY_S = 0.25
_LIBC = ctypes.CDLL(None, use_errno=True)


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write every byte at `offset`; a short write is how a full disk begins."""
    while (written := os.pwrite(descriptor, data, offset)) < len(data):
        data, offset = data[written:], offset + written


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AuditLog:
    """The only object that writes a log. Not thread-safe: its owner is one loop.

    Attributes:
        tree: The tree with every durable entry, and none other.
        cut_bytes: How much of a torn last commit recovery cut off.
        rebuilt_tiles: How many torn tiles recovery wrote again.
    """

    def __init__(
        self,
        directory: Path,
        signer: Signer,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        reserve_bytes: int = RESERVE_BYTES,
        clock: Callable[[], float] = time.monotonic,
        on_entry: Callable[[bytes], None] | None = None,
    ) -> None:
        """Take the lock and recover.

        Args:
            directory: The log's folder; made with mode 0700 where missing.
            signer: Holds the log's private key.
            segment_bytes: When a segment is full.
            reserve_bytes: How far ahead of the last commit zeros are written.
            clock: For retries only.
            on_entry: Told every entry that recovery reads in the last segment, in order.

        Raises:
            AuditLogError: Another writer, damage, another key, or a folder that can't be written.
        """
        self.directory = directory
        self.tree = Tree()
        self.cut_bytes = 0
        self.rebuilt_tiles = 0
        self._signer = CheckpointSigner(signer)
        self._segment_bytes = segment_bytes
        self._reserve_bytes = reserve_bytes
        self._clock = clock
        self._on_entry = on_entry or (lambda _entry: None)
        self._reader = TileReader(directory)
        self._segment: Path
        self._descriptor = -1
        self._offset = 0
        self._reserved = 0
        self._last_commit = b""
        self._digest = sha256()
        self._broken = False
        self._retry_at = 0.0
        self._bundle = bytearray()
        self._marks: deque[int] = deque()
        self._note = b""
        self._published_size = -1
        self._unsynced: deque[Path] = deque()
        self._lock = self._take_lock()
        try:
            self._recover()
        except (OSError, JournalError, TileError, NoteError) as err:
            self.release()
            detail = getattr(err, "strerror", None) or str(err)
            where = f" (entry {err.index}, offset {err.offset})" if isinstance(err, JournalError) else ""
            raise AuditLogError(
                f"The audit log in {directory} is refused: {detail}{where} Run 'strongroom audit verify {directory}' "
                "and keep a copy before you change anything."
            ) from err
        except AuditLogError:
            self.release()
            raise

    @property
    def origin(self) -> str:
        """The log's name, which is that of its key."""
        return self._signer.key.name

    # Opening ------------------------------------------------------------------------------------------------------

    def _take_lock(self) -> int:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise AuditLogError(f"The audit log folder {self.directory} can't be written: {err.strerror}.") from err
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(descriptor)
            raise AuditLogError(
                f"Another writer holds the audit log in {self.directory}; a log has one writer. Stop the other first."
            ) from err
        return descriptor

    def _recover(self) -> None:
        self._check_vkey()
        published = self._covered()
        segments = journal.list_segments(self.directory)
        if not segments:
            if published:
                raise JournalError("The journal is gone but the checkpoint is not.", index=0, offset=0)
            (self.directory / journal.FOLDER).mkdir(mode=0o700, exist_ok=True)
            self._open_segment()
            self._note = self._signer.note(0, self.tree.root())
            self.publish()
            return
        first, path = segments[-1]
        if path.stat().st_size <= len(journal.segment_line(self.origin, first)) and len(segments) > 1:
            # A crash between making a segment and its first commit: it holds nothing, the one before is the last.
            path.unlink()
            sync_folder(path.parent)
            segments.pop()
            first, path = segments[-1]
        self.tree = Tree.from_tiles(first, self._reader.hashes)
        self._load_bundle(first)
        self._replay(first, path, published)

    def _check_vkey(self) -> None:
        path = self.directory / "vkey"
        if path.exists():
            if VerifierKey.parse(path.read_text()) != self._signer.key:
                raise AuditLogError(
                    f"The audit log in {self.directory} belongs to another key than the one given. Give the log's own "
                    "key, or start a new log in another folder."
                )
            return
        self._replace(path, f"{self._signer.key}\n".encode(), sync=True)

    def _covered(self) -> int:
        """Return how many entries were durable for sure: published, or cosigned by a witness."""
        size = 0
        for name in ("checkpoint", "cosignatures"):
            path = self.directory / name
            # Empty or zero is what a power cut leaves of a file that was never synced; it proves nothing.
            if path.exists() and (note := path.read_text().strip("\x00")):
                size = max(size, verify_checkpoint(note, self._signer.key).size)
        return size

    def _check_note(self, commit: Commit, root: bytes) -> None:
        size = commit.first + commit.count
        if verify_checkpoint(commit.note.decode(), self._signer.key) != Checkpoint(self.origin, size, root):
            raise JournalError("A commit's entries are not those that were signed.", index=commit.first, offset=0)

    def _load_bundle(self, size: int) -> None:
        width = size % TILE_WIDTH
        if width:
            for entry in self._reader.entries(size // TILE_WIDTH, width):
                self._bundle += len(entry).to_bytes(2, "big") + entry

    def _replay(self, first: int, path: Path, published: int) -> None:
        self._segment = path
        last: Commit | None = None
        with path.open("rb") as file:
            try:
                self._offset = journal.read_segment_line(file, self.origin, first)
                for commit in journal.read_commits(file, first):
                    self._replay_commit(commit)
                    last = commit
                    self._offset = commit.end
            except JournalError as err:
                if not err.torn_bytes or err.index < published:
                    raise
                self.cut_bytes = err.torn_bytes
                self._offset = err.offset
        if published > self.tree.size:
            raise JournalError(
                f"The checkpoint has {published} entries, the journal {self.tree.size}: its tail was cut off.",
                index=self.tree.size,
                offset=self._offset,
            )
        if last is not None:
            self._check_note(last, self.tree.root())
            self._note = last.note
            self._last_commit = journal.encode_commit(last.first, last.count, last.entries, last.note)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if self._offset == 0:
            line = journal.segment_line(self.origin, first)
            write_all(self._descriptor, line, 0)
            self._offset = len(line)
        os.ftruncate(self._descriptor, self._offset)
        self._reserved = self._offset
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._digest = sha256()
        while chunk := os.read(self._descriptor, 1 << 20):
            self._digest.update(chunk)
        os.fdatasync(self._descriptor)
        if not self._note:
            self._note = self._signer.note(self.tree.size, self.tree.root())
        self.publish()

    def _replay_commit(self, commit: Commit) -> None:
        entries = split_entries(commit.entries)
        if len(entries) != commit.count:
            raise JournalError("A commit's count is wrong.", index=commit.first, offset=commit.offset)
        for entry in entries:
            self.tree.append(leaf_hash(entry))
            self._on_entry(entry)
        self._check_text(commit)
        self._append_bundle(commit.entries, entries)
        self._write_full_tiles()

    def _check_text(self, commit: Commit) -> None:
        text = Checkpoint(self.origin, self.tree.size, self.tree.root()).text()
        if not commit.note.startswith(text.encode() + b"\n"):
            raise JournalError("A commit's root is wrong.", index=commit.first, offset=commit.offset)

    # Committing ---------------------------------------------------------------------------------------------------

    def _open_segment(self) -> None:
        first = self.tree.size
        path = self.directory / journal.FOLDER / journal.segment_name(first)
        line = journal.segment_line(self.origin, first)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(descriptor, line, 0)
            os.fsync(descriptor)
            sync_folder(path.parent)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._segment, self._descriptor, self._last_commit = path, descriptor, b""
        self._digest = sha256(line)
        self._offset = self._reserved = len(line)

    def commit(self, packed: bytes, entries: list[bytes]) -> int:
        """Make entries durable and return the index of the first.

        Args:
            packed: The entries, each behind its length.
            entries: The same, apart.

        Raises:
            OSError: Nothing was appended, disk or signer failed; the next call tries to mend the file first.
        """
        if self._broken:
            self._mend()
        tree = self.tree
        first, mark = tree.size, tree.mark()
        append, leaf = tree.append, leaf_hash
        for entry in entries:
            append(leaf(entry))
        try:
            note = self._signer.note(tree.size, tree.root())
            commit = journal.encode_commit(first, len(entries), packed, note)
            if self._offset + len(commit) > self._reserved:
                self._reserve(len(commit))
            write_all(self._descriptor, commit, self._offset)
            os.fdatasync(self._descriptor)
        except OSError:
            # The signature dies here; after a failed sync the kernel may have dropped the pages: no second try.
            tree.reset(mark)
            self._broken = True
            self._retry_at = self._clock() + RETRY_S
            raise
        self._offset += len(commit)
        self._digest.update(commit)
        self._last_commit = commit
        self._note = note
        self._append_bundle(packed, entries)
        return first

    def _reserve(self, least_bytes: int) -> None:
        """Write zeros ahead; the coming sync makes them durable with the commit."""
        end = max(self._offset + least_bytes, min(self._reserved + self._reserve_bytes, self._segment_bytes))
        write_all(self._descriptor, bytes(end - self._reserved), self._reserved)
        self._reserved = end

    def _mend(self) -> None:
        """Cut the file back to what is durable and prove it by reading it from the disk."""
        if self._clock() < self._retry_at:
            raise OSError(5, "the audit log's disk failed a moment ago")
        self._retry_at = self._clock() + RETRY_S
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._descriptor = os.open(self._segment, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self._descriptor, self._offset)
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        length = len(self._last_commit)
        if os.pread(self._descriptor, length, self._offset - length) != self._last_commit:
            raise OSError(5, "the last durable commit can't be read back")
        self._reserved = self._offset
        self._broken = False

    def _append_bundle(self, packed: bytes, entries: list[bytes]) -> None:
        """Keep the entries that no full bundle has taken, and where full bundles end."""
        before = self.tree.size - len(entries)
        at = len(self._bundle)
        self._bundle += packed
        if before // TILE_WIDTH == self.tree.size // TILE_WIDTH:
            return
        for number, entry in enumerate(entries, before + 1):
            at += 2 + len(entry)
            if number % TILE_WIDTH == 0:
                self._marks.append(at)

    @property
    def is_segment_full(self) -> bool:
        """Whether the next commit should go to a new segment."""
        return self._offset >= self._segment_bytes

    def rotate(self) -> str:
        """Close the segment, its tiles durable, and open the next.

        Returns:
            SHA-256 of the closed segment's bytes. Once it stands in an entry, the tree's signature vouches for every
            signature in that segment, and a verifier need not verify each.

        Raises:
            OSError: Nothing changed, or the next commit tries again.
        """
        self.publish()
        while self.sync_tile():
            pass
        for level in (None, *range(len(self.tree.levels))):
            self._sync_open(level)
        self._trim()
        digest = self._digest.hexdigest()
        self._open_segment()
        return digest

    def _trim(self) -> None:
        """Drop the zeros ahead: a closed segment ends with its last commit."""
        os.ftruncate(self._descriptor, self._offset)
        self._reserved = self._offset
        os.fsync(self._descriptor)

    def _sync_open(self, level: int | None) -> None:
        width = (self.tree.size >> (8 * (level or 0))) % TILE_WIDTH
        if width:
            index = (self.tree.size >> (8 * (level or 0))) // TILE_WIDTH
            self._sync_file(self.directory / tile_path(level, index, width))

    # Publishing ---------------------------------------------------------------------------------------------------

    @property
    def is_published(self) -> bool:
        """Whether tiles and checkpoint hold every entry."""
        return self._published_size == self.tree.size

    def publish(self) -> None:
        """Bring tiles, bundles and `checkpoint` up to the last commit.

        Raises:
            OSError: The journal is not affected; call again later.
        """
        if self.is_published:
            return
        self._write_full_tiles()
        size = self.tree.size
        if self._bundle:
            self._write_tile(tile_path(None, size // TILE_WIDTH, size % TILE_WIDTH), bytes(self._bundle))
        for level, index, hashes in self.tree.open_tiles():
            self._write_tile(tile_path(level, index, len(hashes)), b"".join(hashes))
        self._replace(self.directory / "checkpoint", self._note, sync=False)
        self._published_size = size

    def _write_full_tiles(self) -> None:
        while self._marks:
            index, end = self.tree.size // TILE_WIDTH - len(self._marks), self._marks[0]
            self._unsynced.append(self._write_tile(tile_path(None, index), bytes(self._bundle[:end])))
            del self._bundle[:end]
            self._marks = deque(mark - end for mark in list(self._marks)[1:])
        for level, index, hashes in self.tree.take_full_tiles():
            self._unsynced.append(self._write_tile(tile_path(level, index), b"".join(hashes)))

    def _write_tile(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            self._replace(path, data, sync=False)
            return path
        if found != data:
            # Short, or zero from some point on: torn by a power cut. Anything else was changed by somebody.
            if not data.startswith(found.rstrip(b"\x00")):
                raise TileError(f"{name} is not what the journal says.")
            self.rebuilt_tiles += 1
            self._replace(path, data, sync=False)
        return path

    def _replace(self, path: Path, data: bytes, *, sync: bool) -> None:
        temporary = path.with_name(f".{path.name}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_all(descriptor, data, 0)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        if sync:
            sync_folder(path.parent)

    def sync_tile(self) -> bool:
        """Make one full tile durable, drop its partial ones; return whether there was one. For idle moments."""
        if not self._unsynced:
            return False
        path = self._unsynced[0]
        self._sync_file(path)
        sync_folder(path.parent)
        self._drop_partials(path)
        self._unsynced.popleft()
        return True

    @staticmethod
    def _drop_partials(path: Path) -> None:
        partials = path.with_name(f"{path.name}.p")
        if partials.is_dir():
            for partial in partials.iterdir():
                partial.unlink()
            partials.rmdir()

    def sync_tiles(self) -> None:
        """Make all full tiles durable at once; may run in another thread while this one commits.

        Under a load that leaves no idle moment they are thousands of files when a segment is full: one syncfs, beside
        the loop, takes their place.
        """
        count = len(self._unsynced)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _LIBC.syncfs(descriptor):
                raise OSError(ctypes.get_errno(), "syncfs failed")
        finally:
            os.close(descriptor)
        for _ in range(count):
            self._drop_partials(self._unsynced.popleft())

    @staticmethod
    def _sync_file(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # Closing ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Publish, make the tiles durable, let go of the lock.

        Raises:
            OSError: The journal is whole; recovery will mend the tiles.
        """
        try:
            self.publish()
            while self.sync_tile():
                pass
            self._trim()
        finally:
            self.release()

    def release(self) -> None:
        """Close files and lock, whatever their state."""
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1
