"""The weights of a sealed model inside a worker: key fetched, shards opened, tensors handed out, all closed."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from server.engine.vllm.device_open import Mode, new_opener
from server.engine.vllm.lazy import DTYPES, SealedTensor, storages
from server.errors import KMSDeniedError, SealError, StartError
from server.sealed.agent import (
    ERROR_PREFIX,
    KEY_FD_ENV,
    KEY_REQUEST,
    LOADED_ACCEPTED,
    LOADED_REPORT,
    MAX_PACKET_BYTES,
)
from server.sealed.envelope import verify_key_check
from server.sealed.kms.base import DATA_KEY_BYTES, DataKey
from server.sealed.memory import forbid_core_dumps, forbid_swap
from server.sealed.model import open_pinned
from server.sealed.populate import Populated
from server.sealed.shard import ShardReader
from server.sealed.stage import read_files, verify_staged

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import torch

logger = logging.getLogger("strongroom.loader")

_KEY_TIMEOUT_S: Final = 120.0
_OWN_KEYS: Final = frozenset({"manifest_sha256", "folder", "threads", "lazy", "device_open"})
_MAX_DEFAULT_THREADS: Final = 8


class SealedWeights:
    """What every loader of ours shares, whatever loader of vLLM's it stands in for.

    Keys of ours in `model_loader_extra_config`: `manifest_sha256` (the manifest that the key agent verified), `folder`
    (the sealed folder, where the engine's model path is one of staged files), `threads` (decryption threads), `lazy`
    (true; false hands out ordinary tensors, for a model whose loading code can't take sealed ones), `device_open`
    (`auto`; see `device_open.Mode`).

    Args:
        own: Those keys with their values.

    Raises:
        StartError: The digest is missing.
    """

    def __init__(self, own: dict[str, Any]) -> None:
        self._manifest_sha256 = own.get("manifest_sha256")
        if not isinstance(self._manifest_sha256, str):
            raise StartError("The load format 'strongroom' needs manifest_sha256 in model_loader_extra_config.")
        self._folder = own.get("folder")
        self._threads = int(own.get("threads") or min(_MAX_DEFAULT_THREADS, os.cpu_count() or 1))
        self.lazy = bool(own.get("lazy", True))
        self._opener = new_opener(str(own.get("device_open") or Mode.AUTO))
        self._readers: list[ShardReader] = []
        self._pool: ThreadPoolExecutor | None = None
        self._channel: KeyChannel | None = None

    @classmethod
    def take(cls, load_config: Any) -> tuple[Self, Any]:
        """Return the weights, and the load config without our keys: vLLM's loaders refuse what they don't know."""
        extra = dict(load_config.model_loader_extra_config or {})
        own = {key: extra.pop(key) for key in _OWN_KEYS & extra.keys()}
        stripped = copy.copy(load_config)
        stripped.model_loader_extra_config = extra
        return cls(own), stripped

    @contextlib.contextmanager
    def loading(self) -> Generator[None]:
        """Guard the process, hold the key agent's socket, and tell it at the end how the load went."""
        forbid_core_dumps()
        forbid_swap()
        self._channel = channel = KeyChannel.from_environment()
        try:
            yield
            channel.confirm_load()
        except SealError as err:
            logger.error("sealed model refused (%s): %s", err.kind, err.detail)  # noqa: TRY400
            channel.report(ERROR_PREFIX + err.detail.encode()[: MAX_PACKET_BYTES - 1])
            raise
        finally:
            # Only here: a model may hold on to sealed tensors until its layers are processed, after load_weights.
            self._close()
            channel.close()

    def tensors(self, folder: str, *, into: Iterable[torch.Tensor] = ()) -> Generator[tuple[str, SealedTensor]]:
        """Yield every tensor by name, sealed still. May be called again within one load; the key is fetched once.

        Args:
            folder: The engine's model path.
            into: What they will be copied into: its memory is made ready meanwhile.

        Raises:
            SealError: The folder is not what the key agent verified, or an index does not open.
            KMSDeniedError: There is no key for this worker.
        """
        if not self._readers:
            self._open(Path(self._folder or folder), staged=Path(folder) if self._folder else None)
        with Populated(storages(into), self._pool):
            for reader in self._readers:
                for entry in reader.index.entries:
                    yield (
                        entry.name,
                        SealedTensor(reader, entry.name, 0, entry.shape, DTYPES[entry.dtype], self._opener),
                    )

    def _open(self, folder: Path, *, staged: Path | None) -> None:
        if self._channel is None:
            raise StartError("The engine asked for weights outside of a load; a sealed model is loaded once.")
        sealed = open_pinned(folder, manifest_sha256=str(self._manifest_sha256))
        self._pool = ThreadPoolExecutor(self._threads - 1, "unseal") if self._threads > 1 else None
        with self._channel.fetch_key() as data_key:
            verify_key_check(data_key, sealed.core_digest, sealed.manifest.key_check)
            if staged is not None:
                # vLLM has read its configuration from there: had it been changed meanwhile, this load ends here.
                verify_staged(staged, read_files(sealed, data_key.reveal()))
            for shard in sealed.weights:
                self._readers.append(
                    ShardReader(
                        sealed.path, shard, sealed.core, data_key.reveal(), pool=self._pool, threads=self._threads
                    )
                )

    def _close(self) -> None:
        while self._readers:
            self._readers.pop().close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._channel = None


class KeyChannel:
    """The worker's end of the socket to the key agent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(_KEY_TIMEOUT_S)

    @classmethod
    def from_environment(cls) -> KeyChannel:
        """Take over the inherited descriptor.

        Raises:
            StartError: The engine was not started by a supervisor, or the descriptor was lost on the way.
        """
        try:
            return cls(socket.socket(fileno=int(os.environ[KEY_FD_ENV])))
        except (KeyError, ValueError, OSError) as err:
            raise StartError(
                f"{KEY_FD_ENV} names no open socket: a sealed model loads only under 'strongroom serve'."
            ) from err

    def fetch_key(self) -> DataKey:
        """Ask for the data key.

        Raises:
            KMSDeniedError: The key agent refused or did not answer.
        """
        buffer = bytearray(MAX_PACKET_BYTES)
        try:
            self._sock.send(KEY_REQUEST)
            count = self._sock.recv_into(buffer)
        except OSError as err:
            raise KMSDeniedError("The key agent did not answer. See the supervisor's log.") from err
        try:
            if count != DATA_KEY_BYTES:
                reason = buffer[len(ERROR_PREFIX) : count].decode(errors="replace") if count else "it closed the socket"
                raise KMSDeniedError(f"The key agent gave no key: {reason}.")
            return DataKey(memoryview(buffer)[:DATA_KEY_BYTES])
        finally:
            buffer[:] = bytes(len(buffer))

    def confirm_load(self) -> None:
        """Have the load put on record, and the version made the model's floor; a model that is not does not serve.

        Raises:
            StartError: The key agent could not, or is gone.
        """
        try:
            self._sock.send(LOADED_REPORT)
            answer = self._sock.recv(MAX_PACKET_BYTES)
        except OSError as err:
            raise StartError("The key agent did not confirm the load. See the supervisor's log.") from err
        if answer != LOADED_ACCEPTED:
            reason = answer[len(ERROR_PREFIX) :].decode(errors="replace") or "it closed the socket"
            raise StartError(f"The key agent did not accept the load: {reason}. See the supervisor's log.")

    def report(self, packet: bytes) -> None:
        """Tell the key agent how the load went."""
        try:
            self._sock.send(packet)
        except OSError:
            logger.warning("the key agent is gone; it did not hear how the load went")

    def close(self) -> None:
        """Close the descriptor for good."""
        self._sock.close()
