"""Lay a model's config and tokenizer files where an engine reads them: verified copies, sealed ones on a tmpfs only."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from server.errors import ConfigError, StartError
from server.sealed.memory import is_memory_backed
from server.sealed.model import read_plain_file
from server.sealed.shard import ShardReader

if TYPE_CHECKING:
    from pathlib import Path

    from server.sealed.agent import Release
    from server.sealed.stream import Bytes


def stage_files(release: Release, folder: Path) -> None:
    """Write every config and tokenizer file of a released model into the new folder `folder` (0700).

    The engine is given this folder as its model, and the sealed one as `folder` in `model_loader_extra_config`: what it
    reads is what was verified, even if the sealed folder is changed afterwards.

    Args:
        release: From `KeyAgent.release`; its key must not have been handed on yet.
        folder: Does not exist yet; on a tmpfs where the files are sealed. The caller removes it when the engine ends.

    Raises:
        SealError: A file is not what was signed, or does not open.
        StartError: Sealed files, and the folder is on a disk.
        ConfigError: The folder cannot be written.
    """
    model = release.model
    if model.sealed_files is not None and not is_memory_backed(folder.parent):
        raise StartError(
            f"{model.core.model_id} has sealed config and tokenizer files, which may be opened in memory only, and "
            f"{folder.parent} is on a disk. Give it a folder on a tmpfs."
        )
    try:
        folder.mkdir(mode=0o700)
    except OSError as err:
        raise ConfigError(f"{folder} cannot be made: {err.strerror}.") from err
    try:
        for record in model.manifest.files:
            _write(folder / record.name, read_plain_file(model, record.name))
        if model.sealed_files is not None:
            with ShardReader(model.path, model.sealed_files, model.core, release.data_key.reveal()) as reader:
                for entry in reader.index.entries:
                    content = bytearray(entry.num_bytes)
                    reader.read_into(entry.name, memoryview(content))
                    _write(folder / entry.name, content)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _write(path: Path, content: Bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
