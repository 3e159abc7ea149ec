"""LoRA adapters: served as models of their own by their model's engine, and only with the bytes that were approved.

The engine reads copies in a private folder in memory, made while they were checked: vLLM reads an adapter anew whenever
it dropped it for another.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from hashlib import sha256
from typing import TYPE_CHECKING

from server.errors import ConfigError, StartError
from server.sealed.memory import is_tmpfs
from server.sealed.stage import new_staged

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from server.settings import AdapterSettings, ModelSettings

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""All that an adapter's folder may hold: vLLM would also take pickles from it."""

_CHUNK_BYTES = 1024 * 1024


def digest_adapter(folder: Path, *, copy_to: Path | None = None) -> str:
    """Return what `sha256sum adapter_config.json adapter_model.safetensors | sha256sum` says in the folder.

    Args:
        folder: The adapter's.
        copy_to: A folder that gets the very bytes that were hashed.

    Raises:
        ConfigError: The folder can't be read, or holds another file, named; or the copy can't be written.
    """
    lines = []
    try:
        if others := sorted(path.name for path in folder.iterdir() if path.name not in FILES):
            raise ConfigError(f"The adapter {folder} holds {others[0]!r}; only {' and '.join(FILES)} may be there.")
        for name in FILES:
            digest = sha256()
            with ExitStack() as stack:
                file = stack.enter_context((folder / name).open("rb"))
                copy = stack.enter_context(_create(copy_to / name)) if copy_to is not None else None
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    if copy is not None:
                        copy.write(chunk)
            lines.append(f"{digest.hexdigest()}  {name}\n")
    except OSError as err:
        what = "copied into memory" if copy_to is not None else "read"
        raise ConfigError(f"The adapter {folder} can't be {what}: {err.strerror} ({err.filename}).") from err
    return sha256("".join(lines).encode()).hexdigest()


def verify_adapters(model: ModelSettings) -> None:
    """Check that every adapter of a model on this machine is what the settings approve.

    Raises:
        ConfigError: One is not, by name.
    """
    for adapter in model.adapters:
        if adapter.path is not None:
            _require_approved(adapter, digest_adapter(adapter.path))


def staged_paths(model: ModelSettings, folder: Path) -> dict[str, Path]:
    """Return where `stage_adapters` puts the adapters of a model on this machine, by id."""
    return {adapter.id: folder / adapter.id for adapter in model.adapters if adapter.path is not None}


def stage_adapters(model: ModelSettings, folder: Path) -> None:
    """Copy every adapter of a model into `folder` (0700, emptied first), each checked by the bytes that were copied.

    Args:
        model: The model's settings.
        folder: From `staging_folder`. The caller removes it with `clear_staged` when the engine has ended.

    Raises:
        ConfigError: An adapter is not what the settings approve, by name, or can't be read or copied.
        StartError: The folder is somebody else's, not on a tmpfs, or can't be written.
    """
    if not is_tmpfs(folder.parent):
        raise StartError(f"{folder.parent} is not a tmpfs: adapters are handed to an engine in memory only.")
    with new_staged(folder):
        targets = staged_paths(model, folder)
        for adapter in model.adapters:
            if adapter.path is not None:
                targets[adapter.id].mkdir(mode=0o700)
                _require_approved(adapter, digest_adapter(adapter.path, copy_to=targets[adapter.id]))


def _require_approved(adapter: AdapterSettings, digest: str) -> None:
    if digest != adapter.sha256:
        raise ConfigError(
            f"The adapter {adapter.id!r} at {adapter.path} is not the one that the settings approve: its sha256 "
            "differs. See docs/engine.md for how it is computed."
        )


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400), "wb")


def adapter_digest(model_digest: str, adapter: AdapterSettings) -> str:
    """Return the digest that stands in the records of an adapter: of its model's and its own, with a + between."""
    return sha256(f"{model_digest}+{adapter.sha256}".encode()).hexdigest()


def settings_of(model: ModelSettings, adapter: AdapterSettings) -> ModelSettings:
    """Return the settings of an adapter as a model: its own names and stage, everything else its model's."""
    own = {"id": adapter.id, "aliases": adapter.aliases, "stage": adapter.stage, "adapters": ()}
    return model.model_copy(update=own)
