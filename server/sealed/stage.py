"""Config and tokenizer files on their way to who reads them: verified copies in memory, never the sealed folder's own.

What was verified is what is read: an engine gets the files in a private folder on a tmpfs, the gateway in an anonymous
file that nobody can write to. Files that were sealed exist in the clear nowhere else.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from server.errors import SealError, StartError
from server.sealed.memory import is_memory_backed, is_tmpfs
from server.sealed.model import read_plain_file
from server.sealed.shard import ShardReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from server.sealed.agent import Release
    from server.sealed.model import SealedModel
    from server.sealed.stream import Bytes

FILES_FD_ENV: Final = "STRONGROOM_FILES_FD"
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - what is made there is made and checked as private
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def read_files(model: SealedModel, data_key: Bytes) -> dict[str, bytes]:
    """Return every config and tokenizer file of an opened model, by name.

    Raises:
        SealError: A file is not what was signed, or does not open.
    """
    files = {record.name: read_plain_file(model, record.name) for record in model.manifest.files}
    if model.sealed_files is not None:
        with ShardReader(model.path, model.sealed_files, model.core, data_key) as reader:
            for entry in reader.index.entries:
                content = bytearray(entry.num_bytes)
                reader.read_into(entry.name, memoryview(content))
                files[entry.name] = bytes(content)
                content[:] = bytes(len(content))
    return files


def staging_folder(owner: Path, candidates: Sequence[Path] | None = None) -> Path:
    """Return the folder on a tmpfs for the files of `owner`, a path that no other engine of this user has.

    The name follows from `owner`, so that the next start finds and clears what a killed one left.

    Raises:
        StartError: There is no tmpfs to write to.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = candidates if candidates is not None else [*([Path(runtime)] if runtime else []), _SHARED_MEMORY]
    for place in places:
        if place.is_dir() and is_tmpfs(place) and os.access(place, os.W_OK | os.X_OK):
            digest = hashlib.sha256(os.fsencode(owner.absolute())).hexdigest()[:16]
            return place / f"strongroom-files-{os.getuid()}-{digest}"
    raise StartError(
        f"There is no tmpfs at {' or '.join(map(str, places))}: config and tokenizer files are handed to an engine in "
        f"memory only. Mount one at {_SHARED_MEMORY}, or set XDG_RUNTIME_DIR to one."
    )


def stage_files(release: Release, folder: Path) -> None:
    """Write every config and tokenizer file of a released model into `folder` (0700), which is emptied first.

    The engine is given this folder as its model, and the sealed one as `folder` in `model_loader_extra_config`: what it
    reads is what was verified, even if the sealed folder is changed afterwards.

    Args:
        release: From `KeyAgent.release`; its key must not have been handed on yet.
        folder: From `staging_folder`. The caller removes it with `clear_staged` when the engine has ended.

    Raises:
        SealError: A file is not what was signed, or does not open.
        StartError: The folder is somebody else's, not on a tmpfs, or, for sealed files, on one that can be swapped out.
    """
    model = release.model
    place = folder.parent
    if not is_tmpfs(place):
        raise StartError(f"{place} is not a tmpfs: config and tokenizer files are handed to an engine in memory only.")
    if model.sealed_files is not None and not is_memory_backed(place):
        raise StartError(
            f"{model.core.model_id} has sealed config and tokenizer files, which may be opened in memory only, and "
            f"{place} can be swapped to a disk. Turn swap off ('swapoff -a'), or mount the tmpfs with 'noswap'."
        )
    with new_staged(folder):
        for name, content in read_files(model, release.data_key.reveal()).items():
            _write(folder / name, content)


@contextmanager
def new_staged(folder: Path) -> Iterator[None]:
    """Make a staged folder (0700) anew for the block that fills it; where that fails, nothing is left of it.

    Raises:
        StartError: The folder is somebody else's, or can't be made or written.
    """
    clear_staged(folder)
    try:
        folder.mkdir(mode=0o700)
    except OSError as err:
        raise StartError(f"{folder} cannot be made: {err.strerror}. Remove what stands there.") from err
    try:
        yield
    except OSError as err:
        shutil.rmtree(folder)
        raise StartError(f"{folder} cannot be written: {err.strerror}.") from err
    except BaseException:
        shutil.rmtree(folder)
        raise


def clear_staged(folder: Path) -> None:
    """Remove a staged folder, if it is there.

    Raises:
        StartError: What stands there is a link or another user's.
    """
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return
    # On a folder that all may write to, somebody else may have been first: his files must never be read as verified.
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise StartError(f"{folder} is not a folder of this user. Remove it and start again.")
    shutil.rmtree(folder)


def verify_staged(folder: Path, files: Mapping[str, Bytes]) -> None:
    """Hold a staged folder against the verified files, from inside the engine that has just read it.

    Raises:
        SealError: Something was changed, added or removed since; kind `signature`.
    """
    found = {path.name for path in folder.iterdir()}
    for name in sorted(found ^ files.keys()):
        raise SealError(f"{name}: added to or removed from the staged files", kind="signature")
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink() or path.read_bytes() != content:
            raise SealError(f"{name}: replaced since it was staged", kind="signature")


@dataclass(frozen=True, slots=True)
class OpenedFiles:
    """The files of a model that has them sealed, as the supervisor hands them to the gateway."""

    manifest_digest: str
    files: Mapping[str, bytes]


def hand_files_on(opened: Mapping[str, OpenedFiles]) -> int:
    """Return a descriptor of an anonymous file in memory, sealed against writing, that holds `opened` by model id."""
    content = {
        model_id: {
            "manifest": item.manifest_digest,
            "files": {name: base64.b64encode(data).decode() for name, data in item.files.items()},
        }
        for model_id, item in opened.items()
    }
    fd = os.memfd_create("strongroom-files", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(content).encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def take_handed_files() -> dict[str, OpenedFiles]:
    """Return what the supervisor handed on, and close it; empty where it handed nothing.

    Raises:
        StartError: The descriptor is not one of `hand_files_on`.
    """
    number = os.environ.pop(FILES_FD_ENV, None)
    if number is None:
        return {}
    try:
        fd = int(number)
        is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) == _SEALS
        content = os.pread(fd, os.fstat(fd).st_size, 0) if is_sealed else b""
        os.close(fd)
    except (OSError, ValueError) as err:
        raise StartError(f"{FILES_FD_ENV} names no file of the supervisor's.") from err
    if not is_sealed:
        raise StartError(f"{FILES_FD_ENV} names a file that others could write to.")
    return {
        model_id: OpenedFiles(
            item["manifest"], {name: base64.b64decode(data, validate=True) for name, data in item["files"].items()}
        )
        for model_id, item in json.loads(content).items()
    }


def _write(path: Path, content: Bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400), "wb") as file:
        file.write(content)
