"""Write a sealed model back as plain safetensors: for a migration or an escrow test, never for serving."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Final

from server.errors import ConfigError
from server.sealed.memory import is_memory_backed
from server.sealed.shard import ShardReader
from server.sealed.stage import read_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

    from server.sealed.format import Index
    from server.sealed.model import SealedModel
    from server.sealed.stream import Bytes

_ALIGNMENT_BYTES: Final = 8


def check_target(out: Path, *, force: bool) -> None:
    """Refuse a target before any key is asked for.

    Raises:
        ConfigError: It exists, its parent doesn't, or it is on a disk and `force` is not set.
    """
    parent = out.absolute().parent
    if out.exists() or not parent.is_dir():
        raise ConfigError(f"{out} must be a new folder in a folder that exists.")
    if not force and not is_memory_backed(parent):
        raise ConfigError(
            f"{parent} is on a disk, or on a tmpfs beside swap: plaintext weights would stay there even after they are "
            f"deleted. Choose a tmpfs (/dev/shm) on a machine without swap, or insist with --force."
        )


def unseal(model: SealedModel, data_key: Bytes, out: Path, *, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write every tensor and file of an opened model into the new folder `out` (0700); removed again on any failure.

    Raises:
        SealError: A chunk does not open; nothing is left in `out`.
        ConfigError: `out` cannot be written.
    """
    weight_map: dict[str, str] = {}
    try:
        out.mkdir(mode=0o700)
    except OSError as err:
        raise ConfigError(f"{out} cannot be made: {err.strerror}.") from err
    try:
        for name, content in read_files(model, data_key).items():
            _write(out / name, content)
        for shard in model.weights:
            name = shard.record.name.removesuffix(".sealed") + ".safetensors"
            with ShardReader(model.path, shard, model.core, data_key) as reader:
                weight_map |= {entry.name: name for entry in reader.index.entries}
                _write_safetensors(out / name, reader, model.core.chunk_bytes, progress)
        total = sum(s.header.payload_bytes for s in model.weights)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(out / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True).encode())
    except OSError as err:
        shutil.rmtree(out)
        raise ConfigError(f"{out} cannot be written: {err.strerror}. What was there is removed.") from err
    except BaseException:
        shutil.rmtree(out)
        raise


def _write_safetensors(path: Path, reader: ShardReader, block_bytes: int, progress: Callable[[int], None]) -> None:
    with _create(path) as file:
        file.write(_header(reader.index))
        block = memoryview(bytearray(block_bytes))
        for entry in reader.index.entries:
            for offset in range(0, entry.num_bytes, block_bytes):
                piece = block[: min(block_bytes, entry.num_bytes - offset)]
                reader.read_into(entry.name, piece, offset)
                file.write(piece)
                progress(len(piece))
        block[:] = bytes(len(block))


def _header(index: Index) -> bytes:
    header: dict[str, object] = {"__metadata__": index.metadata} if index.metadata else {}
    offset = 0
    for entry in index.entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT_BYTES)
    return len(encoded).to_bytes(8, "little") + encoded


def _write(path: Path, content: Bytes) -> None:
    with _create(path) as file:
        file.write(content)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")
