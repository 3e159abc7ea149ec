"""The key agent: verifies a model, has the release recorded, asks the key service, hands the key to one engine."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from server.errors import SealError, StrongroomError
from server.sealed.envelope import unwrap_from_any, verify_key_check
from server.sealed.kms.base import KeyContext
from server.sealed.memory import forbid_core_dumps
from server.sealed.model import SealedModel, open_sealed
from server.sealed.stage import OpenedFiles, read_files

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from server.sealed.kms.base import KMS, DataKey
    from server.sealed.signature import TrustedSigner

logger = logging.getLogger("strongroom.key-agent")

KEY_FD_ENV: Final = "STRONGROOM_KEY_FD"
KEY_REQUEST: Final = b"data-key"
LOADED_REPORT: Final = b"loaded"
LOADED_ACCEPTED: Final = b"accepted"
ERROR_PREFIX: Final = b"!"
MAX_PACKET_BYTES: Final = 4096

KEY_REQUESTED: Final = "weights:key:requested"
KEY_RELEASED: Final = "weights:key:released"
KEY_REFUSED: Final = "weights:key:refused"
MODEL_REFUSED: Final = "weights:model:refused"
MODEL_LOADED: Final = "weights:model:loaded"


# `record(tag, **fields)`: returns once the event is durable on the audit log, raises if it can't be.
Record = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Release:
    """A model that was verified and the key that opens it."""

    model: SealedModel
    data_key: DataKey


class KeyAgent:
    """Releases data keys for one engine.

    Args:
        services: The key services that the configuration names; no other is ever asked.
        trusted_signers: Whose signature on a model counts.
        record: Where every release and refusal goes; nothing is asked of a key service before its intent is durable.
        allow_unsigned: Start models without a trusted signature. Recorded with every release.
    """

    def __init__(
        self,
        *,
        services: Sequence[KMS],
        trusted_signers: Sequence[TrustedSigner],
        record: Record,
        allow_unsigned: bool = False,
    ) -> None:
        self._services = services
        self._trusted = trusted_signers
        self._record = record
        self._allow_unsigned = allow_unsigned

    def release(self, path: Path, *, floor: int = 1, model_id: str | None = None) -> Release:
        """Verify the model, record the intent, ask the key service, record the outcome.

        Args:
            path: The sealed model's folder.
            floor: The lowest version that may be opened, from the store.
            model_id: Whose floor that is; a folder that holds another model is refused. None for any.

        Raises:
            SealError: The model was refused; the refusal is recorded.
            KMSError: The key was not released; the refusal is recorded.
        """
        forbid_core_dumps()  # from here on this process holds data keys
        try:
            model = open_sealed(path, trusted_signers=self._trusted, floor=floor, allow_unsigned=self._allow_unsigned)
            if model_id not in (None, model.core.model_id):
                raise SealError(f"{path.name}: it holds {model.core.model_id}, not {model_id}", kind="version")
        except SealError as err:
            self._record(MODEL_REFUSED, folder=path.name, kind=err.kind, detail=err.detail, floor=floor)
            raise
        return Release(model, release_key(model, self._services, self._record, floor=floor))

    def open_files(self, path: Path, *, floor: int = 1, model_id: str | None = None) -> OpenedFiles:
        """Release the key for the config and tokenizer files alone; it is zeroed when this returns.

        Raises:
            SealError: As `release`, or a file does not open; recorded.
            KMSError: As `release`.
        """
        release = self.release(path, floor=floor, model_id=model_id)
        with release.data_key as data_key:
            try:
                files = read_files(release.model, data_key.reveal())
            except SealError as err:
                self._record(MODEL_REFUSED, **_fields(release.model), kind=err.kind, detail=err.detail)
                raise
        return OpenedFiles(release.model.manifest_digest.hex(), files)

    def serve(self, sock: socket.socket, release: Release, *, num_workers: int = 1) -> threading.Thread:
        """Answer the engine's workers from a thread until each had the key once and reported, or the engine is gone.

        Args:
            sock: This process's end of an AF_UNIX SOCK_SEQPACKET pair; closed at the end.
            release: What `release` returned; its key is zeroed once every worker has it.
            num_workers: How many workers load weights (tensor times pipeline parallel size); a further request is
                refused, so that nothing in the engine can fetch the key later.

        Returns:
            The running thread.
        """
        thread = threading.Thread(target=self._serve, args=(sock, release, num_workers), name="key-agent", daemon=True)
        thread.start()
        return thread

    def _serve(self, sock: socket.socket, release: Release, num_workers: int) -> None:
        fields = _fields(release.model)
        num_released = 0
        with sock, release.data_key as data_key:
            while True:
                try:
                    packet = sock.recv(MAX_PACKET_BYTES)
                    if not packet:
                        return
                    if packet == KEY_REQUEST and num_released < num_workers:
                        num_released += 1
                        sock.send(data_key.reveal())
                        if num_released == num_workers:
                            data_key.close()
                    elif packet == KEY_REQUEST:
                        sock.send(ERROR_PREFIX + b"every worker has had the key already")
                    elif packet == LOADED_REPORT:
                        # The engine waits for this before it goes on: what is not on record does not serve.
                        self._record(MODEL_LOADED, **fields)
                        sock.send(LOADED_ACCEPTED)
                    elif packet.startswith(ERROR_PREFIX):
                        detail = packet[1:].decode(errors="replace")
                        self._record(MODEL_REFUSED, **fields, kind="payload", detail=detail)
                except OSError:
                    return  # the engine died; the supervisor sees that for itself
                except StrongroomError as err:
                    logger.error("the engine's report could not be put on record: %s", err)  # noqa: TRY400
                    with contextlib.suppress(OSError):  # it may be gone
                        sock.send(ERROR_PREFIX + err.code.encode())


def release_key(model: SealedModel, services: Sequence[KMS], record: Record, **more: str | int) -> DataKey:
    """Record the intent, ask the key services for an opened model's data key, record the outcome.

    Args:
        model: Verified.
        services: Who may be asked.
        record: The intent is durable on it before any of them is.
        more: Further fields of the record.

    Raises:
        SealError: Sealed for none of the services, or the key is another model's; recorded.
        KMSError: The key was not released; recorded.
    """
    fields = _fields(model) | more
    record(KEY_REQUESTED, **fields)
    data_key: DataKey | None = None
    try:
        data_key = unwrap_from_any(model.recipients, services, KeyContext.of(model.core))
        verify_key_check(data_key, model.core_digest, model.manifest.key_check)
        record(KEY_RELEASED, **fields)
    except StrongroomError as err:
        if data_key is not None:
            data_key.close()
        detail = err.detail if isinstance(err, SealError) else str(err)
        record(KEY_REFUSED, **fields, code=err.code, detail=detail)
        raise
    return data_key


def _fields(model: SealedModel) -> dict[str, str | int | bool | None]:
    return {
        "model": model.core.model_id,
        "version": model.core.version,
        "seal_id": model.core.seal_id,
        "digest": model.core_digest.hex(),
        "signer": model.signer,
    }
