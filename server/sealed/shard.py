"""One shard as a file: written in one pass, read a tensor at a time into the caller's own memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import FileIO
from typing import TYPE_CHECKING, Protocol, Self

from server.errors import SealError
from server.sealed.format import (
    HEADER_BYTES,
    TAG_BYTES,
    Index,
    IndexEntry,
    ShardHeader,
    ShardRecord,
    marshal_header,
    marshal_index,
    num_pieces,
    parse_header,
    parse_index,
)
from server.sealed.memory import HUGE_PAGE_BYTES
from server.sealed.stream import Bytes, ShardCipher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.sealed.format import Core, Kind

_HASH_QUEUE_DEPTH = 4


class TensorSource(Protocol):
    """Where the plaintext of one shard comes from."""

    index: Index

    def read_into(self, position: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the tensor at `position` of the index."""
        ...


@dataclass(frozen=True, slots=True)
class VerifiedShard:
    """A shard whose size, header and tag table were held against the manifest; only these tags are used later."""

    record: ShardRecord
    header: ShardHeader
    tags: bytes


def write_shard(
    path: Path,
    source: TensorSource,
    *,
    kind: Kind,
    shard: int,
    num_shards: int,
    core: Core,
    core_digest: bytes,
    data_key: Bytes,
    progress: Callable[[int], None],
) -> ShardRecord:
    """Seal one shard to a new file in constant memory; durable when it returns.

    Hashing the file runs in a second thread beside reading, sealing and writing: SHA-256 is the slowest of the four.
    """
    index = marshal_index(source.index)
    entries = source.index.entries
    header = ShardHeader(
        kind=kind,
        shard=shard,
        num_shards=num_shards,
        chunk_bytes=core.chunk_bytes,
        num_chunks=1 + sum(num_pieces(e.num_bytes, core.chunk_bytes) for e in entries),
        index_bytes=len(index),
        payload_bytes=sum(e.num_bytes for e in entries),
        core_digest=core_digest,
    )
    parse_header(marshal_header(header), path.name)  # never write what a reader refuses
    cipher = ShardCipher(core.suite, data_key, header, path.name)
    tags = bytearray()
    with path.open("xb", buffering=0) as file, _TeeHasher(file.fileno(), core.chunk_bytes + TAG_BYTES) as out:
        out.write(marshal_header(header))
        first = bytearray(len(index) + TAG_BYTES)
        cipher.seal_into(0, index, first)
        out.write(first[:-TAG_BYTES])
        tags += first[-TAG_BYTES:]
        chunk = 1
        with memoryview(bytearray(core.chunk_bytes)) as plain:
            for position, entry in enumerate(entries):
                for offset in range(0, entry.num_bytes, core.chunk_bytes):
                    piece = plain[: min(core.chunk_bytes, entry.num_bytes - offset)]
                    source.read_into(position, offset, piece)
                    sealed = out.buffer()[: len(piece) + TAG_BYTES]
                    cipher.seal_into(chunk, piece, sealed)
                    tags += sealed[-TAG_BYTES:]
                    out.write_buffer(sealed[:-TAG_BYTES])
                    chunk += 1
                    progress(len(piece))
            plain[:] = bytes(len(plain))
        out.write(tags)
        digest = out.hexdigest()
        os.fsync(file.fileno())
    tags_digest = hashlib.sha256(marshal_header(header) + tags).hexdigest()
    return ShardRecord(path.name, header.file_bytes, digest, tags_digest)


class _TeeHasher:
    """Writes to a file and hashes the same bytes in one other thread, a few buffers behind at most."""

    def __init__(self, fd: int, buffer_bytes: int) -> None:
        self._fd = fd
        self._sha = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="seal-hash")
        self._pending: deque[tuple[Future[None], memoryview | None]] = deque()
        self._free = [memoryview(bytearray(buffer_bytes)) for _ in range(_HASH_QUEUE_DEPTH)]
        self._current: memoryview | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()

    def buffer(self) -> memoryview:
        """A buffer to fill and hand to `write_buffer`; waits for the hash where it is too far behind."""
        while not self._free:
            self._collect()
        self._current = self._free.pop()
        return self._current

    def write_buffer(self, data: memoryview) -> None:
        self._write_all(data)
        self._pending.append((self._pool.submit(self._sha.update, data), self._current))

    def write(self, data: Bytes) -> None:
        view = memoryview(bytes(data))
        self._write_all(view)
        self._pending.append((self._pool.submit(self._sha.update, view), None))

    def hexdigest(self) -> str:
        while self._pending:
            self._collect()
        return self._sha.hexdigest()

    def _collect(self) -> None:
        future, buffer = self._pending.popleft()
        future.result()
        if buffer is not None:
            self._free.append(buffer)

    def _write_all(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._fd, data) :]


def verify_shard(
    folder: Path, record: ShardRecord, core: Core, core_digest: bytes, *, place: tuple[Kind, int, int]
) -> VerifiedShard:
    """Hold a shard's size, header and tag table against the manifest; needs no key and reads no payload.

    Args:
        folder: The sealed model's folder.
        record: What the manifest says of it.
        core: The model's core.
        core_digest: Of `core.json`.
        place: Kind, number and number of shards that this file must be.

    Raises:
        SealError: Kind `header` or `signature`.
    """
    with _open_read(folder / record.name) as file:
        fd = file.fileno()
        header_bytes = os.pread(fd, HEADER_BYTES, 0)
        header = parse_header(header_bytes, record.name)
        size = os.fstat(fd).st_size
        if not size == record.num_bytes == header.file_bytes:
            raise SealError(
                f"{record.name}: {size} bytes; the manifest says {record.num_bytes}, its header {header.file_bytes}",
                kind="header",
            )
        if header.core_digest != core_digest or header.chunk_bytes != core.chunk_bytes:
            raise SealError(f"{record.name}: header: it belongs to another model, version or seal", kind="header")
        if (header.kind, header.shard, header.num_shards) != place:
            raise SealError(f"{record.name}: header: it is another shard", kind="header")
        tags = _pread_exactly(fd, TAG_BYTES * header.num_chunks, header.tags_offset, record.name)
    if hashlib.sha256(header_bytes + tags).hexdigest() != record.tags_sha256:
        raise SealError(
            f"{record.name}: header or tag table (chunks 0 to {header.num_chunks - 1}) is not what was signed",
            kind="signature",
        )
    return VerifiedShard(record, header, tags)


@dataclass(frozen=True, slots=True)
class SealedPieces:
    """Whole chunks that cover a range of one tensor, sealed still, for a device that opens them itself.

    Attributes:
        num_bytes: Of ciphertext, and so of plaintext.
        chunk_bytes: Every piece but the last has as many.
        first_chunk: Number of the first one in the shard, for errors.
        file_offset: Where the ciphertext begins in the file.
        key: The shard's key.
        nonces: One a piece; so are `aads` and `tags`. The tags are those that the signature covers.
    """

    num_bytes: int
    chunk_bytes: int
    first_chunk: int
    file_offset: int
    key: bytes = field(repr=False)
    nonces: tuple[bytes, ...]
    aads: tuple[bytes, ...]
    tags: tuple[bytes, ...]


class ShardReader:
    """An open shard: its index in the clear, its tensors on demand. Thread-safe.

    The file stays open until `close`, so that tensors may be read as late as their consumer likes.

    Args:
        folder: The sealed model's folder.
        shard: The shard, verified.
        core: The model's core.
        data_key: The model's data key; a key of the shard is derived, this one is not kept.
        pool: Threads that help the caller's with a tensor's chunks; None for none.
        threads: How many work on one tensor, the caller's included.

    Raises:
        SealError: The index does not open or is malformed.
    """

    def __init__(
        self,
        folder: Path,
        shard: VerifiedShard,
        core: Core,
        data_key: Bytes,
        *,
        pool: ThreadPoolExecutor | None = None,
        threads: int = 2,
    ) -> None:
        self._header = shard.header
        self._threads = threads
        self._name = shard.record.name
        self._tags = memoryview(shard.tags)
        self._cipher = ShardCipher(core.suite, data_key, shard.header, self._name)
        self._pool = pool
        self._local = threading.local()
        self._file = _open_read(folder / self._name)
        try:
            # The whole file will be wanted, in order: the kernel reads ahead while the first tensors are opened.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            index = bytearray(self._header.index_bytes)
            self._open_chunk(0, HEADER_BYTES, memoryview(index))
            self.index = parse_index(bytes(index), self._header, self._name)
        except BaseException:
            self._file.close()
            raise
        self._starts: dict[str, tuple[IndexEntry, int, int]] = {}
        chunk, offset = 1, self._header.payload_offset
        for entry in self.index.entries:
            self._starts[entry.name] = (entry, chunk, offset)
            chunk += num_pieces(entry.num_bytes, self._header.chunk_bytes)
            offset += entry.num_bytes

    def close(self) -> None:
        """Close the file; no tensor can be read any more."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def read_into(self, name: str, destination: memoryview, offset: int = 0) -> None:
        """Decrypt bytes `offset` … of a tensor into `destination`, all of which is filled.

        Raises:
            SealError: A chunk fails; all of `destination` is zeroed. Kind `payload`.
            ValueError: The range is not inside the tensor.
        """
        entry, first_chunk, file_offset = self._starts[name]
        end = offset + len(destination)
        if not 0 <= offset <= end <= entry.num_bytes:
            raise ValueError(f"bytes {offset} to {end} are not inside a tensor of {entry.num_bytes}")
        size = self._header.chunk_bytes
        pieces = range(offset // size, num_pieces(end, size)) if end > offset else range(0)

        def open_piece(piece: int) -> None:
            start, stop = piece * size, min((piece + 1) * size, entry.num_bytes)
            low, high = max(start, offset), min(stop, end)
            target = destination[low - offset : high - offset]
            if high - low == stop - start:
                self._open_chunk(first_chunk + piece, file_offset + start, target)
                return
            whole = memoryview(bytearray(stop - start))
            try:
                self._open_chunk(first_chunk + piece, file_offset + start, whole)
                target[:] = whole[low - start : high - start]
            finally:  # a forged chunk is decrypted before its tag is found wrong
                whole[:] = bytes(len(whole))

        # `next` on an iterator of a list is atomic, so all threads draw from one: a slow one takes fewer runs.
        remaining = iter(_runs(pieces, max(1, HUGE_PAGE_BYTES // size), self._threads))
        errors: list[BaseException] = []

        def open_remaining() -> None:
            try:
                for run in remaining:
                    for piece in run:
                        if errors:
                            return
                        open_piece(piece)
            except BaseException as err:  # noqa: BLE001 - raised again below, by the thread that asked
                errors.append(err)

        helpers = min(self._threads, len(pieces)) - 1
        futures = [self._pool.submit(open_remaining) for _ in range(helpers)] if self._pool is not None else []
        open_remaining()
        # No thread may write to `destination` once it is zeroed. Who has not begun has nothing left to do.
        wait([future for future in futures if not future.cancel()])
        if errors:
            destination[:] = bytes(len(destination))
            raise errors[0]

    @property
    def is_device_openable(self) -> bool:
        """Whether the shard's suite is the one that a device can open."""
        return self._cipher.device_key is not None

    @property
    def chunk_bytes(self) -> int:
        """Plaintext bytes of every chunk of a tensor but its last."""
        return self._header.chunk_bytes

    def tensor_bytes(self, name: str) -> int:
        """Plaintext bytes of a tensor."""
        return self._starts[name][0].num_bytes

    def pieces(self, name: str, first: int, last: int) -> SealedPieces:
        """Return pieces `first` to `last` (exclusive) of a tensor, to be opened elsewhere.

        Raises:
            ValueError: The suite is not one that a device opens, or the tensor has no such pieces.
        """
        entry, first_chunk, file_offset = self._starts[name]
        size = self._header.chunk_bytes
        if self._cipher.device_key is None or not 0 <= first < last <= num_pieces(entry.num_bytes, size):
            raise ValueError(f"{self._name}: no pieces {first} to {last} for a device in this tensor")
        chunks = range(first_chunk + first, first_chunk + last)
        sealed_with = [self._cipher.nonce_and_aad(chunk) for chunk in chunks]
        return SealedPieces(
            num_bytes=min(last * size, entry.num_bytes) - first * size,
            chunk_bytes=size,
            first_chunk=chunks.start,
            file_offset=file_offset + first * size,
            key=self._cipher.device_key,
            nonces=tuple(nonce for nonce, _ in sealed_with),
            aads=tuple(aad for _, aad in sealed_with),
            tags=tuple(bytes(self._tags[TAG_BYTES * chunk : TAG_BYTES * (chunk + 1)]) for chunk in chunks),
        )

    def read_sealed(self, pieces: SealedPieces, buffer: memoryview) -> None:
        """Read the ciphertext of `pieces` into `buffer`, which has exactly as many bytes."""
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], pieces.file_offset + pieces.num_bytes - len(buffer))
            if count == 0:
                raise SealError(f"{self._name}: ends inside chunk {pieces.first_chunk} or later", kind="payload")
            buffer = buffer[count:]

    def refuse_chunk(self, chunk: int) -> SealError:
        """Return the error of a chunk that did not authenticate, wherever it was opened."""
        return SealError(
            f"{self._name}: chunk {chunk} of {self._header.num_chunks}: authentication failed", kind="payload"
        )

    def _open_chunk(self, chunk: int, file_offset: int, destination: memoryview) -> None:
        scratch = self._scratch(len(destination) + TAG_BYTES)
        body = scratch[:-TAG_BYTES]
        if os.preadv(self._file.fileno(), [body], file_offset) != len(body):
            body[:] = _pread_exactly(self._file.fileno(), len(body), file_offset, self._name)
        # The tag that was verified against the signature, not whatever the file holds by now.
        scratch[-TAG_BYTES:] = self._tags[TAG_BYTES * chunk : TAG_BYTES * (chunk + 1)]
        self._cipher.open_into(chunk, scratch, destination)

    def _scratch(self, num_bytes: int) -> memoryview:
        """Ciphertext passes through one buffer a thread: it stays in the core's own cache."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = memoryview(bytearray(max(num_bytes, self._header.chunk_bytes + TAG_BYTES)))
            self._local.buffer = buffer
        return buffer[:num_bytes]


def _runs(pieces: range, run: int, threads: int) -> list[range]:
    """What a thread draws at once: a large page's worth, or a piece where there are few.

    Two threads that write to one new large page at the same moment both fault; the kernel clears a page for each and
    throws one away: every page of a plain copy on two cores (half as much time again), two of five in a load.
    """
    if len(pieces) < run * threads:
        run = 1
    return [pieces[first : first + run] for first in range(0, len(pieces), run)]


def _open_read(path: Path) -> FileIO:
    try:
        return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError as err:
        raise SealError(f"{path.name}: cannot be read: {err.strerror}", kind="header") from err


def _pread_exactly(fd: int, num_bytes: int, offset: int, name: str) -> bytes:
    parts = []
    while num_bytes:
        part = os.pread(fd, num_bytes, offset)
        if not part:
            raise SealError(f"{name}: ends at byte {offset}, {num_bytes} bytes too early", kind="payload")
        parts.append(part)
        offset += len(part)
        num_bytes -= len(part)
    return b"".join(parts)
