"""Change who may open a sealed model: writes `recipients.json` only, reads no payload."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.sealed.agent import release_key
from server.sealed.envelope import unwrap_from_any, verify_key_check, wrap_for_all
from server.sealed.format import RECIPIENTS_NAME, RECIPIENTS_TMP_NAME, marshal_recipients, parse_recipients
from server.sealed.kms.base import KeyContext
from server.sealed.memory import forbid_core_dumps
from server.sealed.seal import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from server.sealed.agent import Record
    from server.sealed.format import Recipient
    from server.sealed.kms.base import KMS, DataKey
    from server.sealed.model import SealedModel


def rewrap(
    model: SealedModel,
    *,
    services: Sequence[KMS],
    to: Sequence[KMS],
    keep: bool = False,
    record: Record | None = None,
) -> tuple[Recipient, ...]:
    """Wrap the data key of an opened model anew; atomic: the old recipients or the new ones are on disk, never half.

    Args:
        model: From `open_sealed`.
        services: What the data key is opened with.
        to: Whom it is wrapped for.
        keep: Keep the other recipients; false removes them. A removed recipient that saw the data key before
            still knows it: to cut somebody off for good, seal the model again.
        record: Where release or refusal go, and the intent before a key service is asked; None for nowhere.

    Returns:
        All recipients, as written.

    Raises:
        SealError: Sealed for none of `services`, or the key is another model's.
        KMSError: A key service refused; nothing was written.
        ConfigError: Nobody to wrap for, or the folder can't be written.
    """
    if not to:
        raise ConfigError("Name at least one key service to wrap the key for: --to URI.")
    forbid_core_dumps()  # from here on this process holds a data key
    context = KeyContext.of(model.core)
    with _locked(model.path), _release(model, services, context, record) as data_key:
        new = wrap_for_all(data_key, to, context)
        replaced = {(r.kms, r.key_id) for r in new}
        kept = tuple(r for r in model.recipients if keep and (r.kms, r.key_id) not in replaced)
        content = marshal_recipients(model.core_digest.hex(), kept + new)
        parse_recipients(content)  # never write what a reader refuses
        _replace(model.path, content)
    return kept + new


def _release(model: SealedModel, services: Sequence[KMS], context: KeyContext, record: Record | None) -> DataKey:
    if record is not None:
        return release_key(model, services, record, act="rewrap")
    data_key = unwrap_from_any(model.recipients, services, context)
    verify_key_check(data_key, model.core_digest, model.manifest.key_check)
    return data_key


def _replace(folder: Path, content: bytes) -> None:
    temporary = folder / RECIPIENTS_TMP_NAME
    try:
        temporary.unlink(missing_ok=True)  # of a run that was killed
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / RECIPIENTS_NAME)
        fsync_folder(folder)
    except OSError as err:
        raise ConfigError(f"{folder} cannot be written: {err.strerror}. Its recipients are unchanged.") from err


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """One rewrap at a time: two would each drop what the other added."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as err:
        raise ConfigError(f"Another rewrap of {folder} is running. Wait for it to end.") from err
    finally:
        os.close(lock)
