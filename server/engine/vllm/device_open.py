"""Open sealed tensors on the device that will hold them: only ciphertext goes over the link."""

from __future__ import annotations

import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import torch
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from server.errors import StartError

if TYPE_CHECKING:
    from server.sealed.shard import SealedPieces, ShardReader

# Two of these in pinned memory and one on the device: enough to keep link and kernels busy, small beside any model.
BATCH_BYTES: Final = 64 << 20
_CHECK_CHUNK_BYTES: Final = 64 << 10


class Mode(StrEnum):
    """Where ChaCha20-Poly1305 models are opened: `auto` takes a CUDA device, `interpret` tries the kernels on a CPU."""

    AUTO = "auto"
    INTERPRET = "interpret"
    OFF = "off"


def new_opener(mode: str) -> DeviceOpener | None:
    """Return what opens on a device, or None where the CPU opens everything.

    Raises:
        StartError: There is no such mode, or the kernels cannot run the way it wants.
    """
    if mode not in set(Mode):
        raise StartError(f"device_open is {mode!r}; it must be one of {', '.join(Mode)}.")
    if mode == Mode.OFF or (mode == Mode.AUTO and not torch.cuda.is_available()):
        return None
    try:
        from serving_kernels import chacha20_poly1305 as kernels
        from serving_kernels import launch
    except ImportError as err:
        if mode == Mode.AUTO:
            return None
        raise StartError("device_open is 'interpret', but Triton is not installed.") from err
    if (mode == Mode.INTERPRET) != launch.INTERPRETED:
        if mode == Mode.AUTO:
            return None
        raise StartError("device_open is 'interpret', but this process compiles its kernels: set TRITON_INTERPRET=1.")
    return DeviceOpener(kernels, "cpu" if mode == Mode.INTERPRET else "cuda")


class DeviceOpener:
    """Moves ciphertext to a device a batch of chunks at a time and opens it there.

    Args:
        kernels: `serving_kernels.chacha20_poly1305`, imported only where it can run.
        device_type: The type of device that it opens on.
        batch_bytes: How much ciphertext travels at once.
    """

    def __init__(self, kernels: Any, device_type: str, *, batch_bytes: int = BATCH_BYTES) -> None:
        self._kernels = kernels
        self._device_type = device_type
        self._batch_bytes = batch_bytes
        self._is_checked = False

    def check(self, device: torch.device) -> None:
        """Open what another implementation sealed, then a forgery of it, before any weight is trusted to this device.

        A tag that verifies says nothing of the bytes that a faulty kernel or driver writes after it.

        Raises:
            StartError: The kernels are wrong on this device.
        """
        key, chunk = secrets.token_bytes(32), _CHECK_CHUNK_BYTES
        plain = secrets.token_bytes(2 * chunk + _CHECK_CHUNK_BYTES // 2 + 5)
        nonces = [secrets.token_bytes(12) for _ in range(3)]
        aads = [secrets.token_bytes(size) for size in (0, 105, 16)]
        pieces = [plain[at : at + chunk] for at in range(0, len(plain), chunk)]
        aead = ChaCha20Poly1305(key)
        sealed = [aead.encrypt(n, piece, aad) for n, piece, aad in zip(nonces, pieces, aads, strict=True)]
        text = torch.frombuffer(bytearray(b"".join(s[:-16] for s in sealed)), dtype=torch.uint8).to(device)
        tags, out = [s[-16:] for s in sealed], torch.zeros(len(plain), dtype=torch.uint8, device=device)
        options: dict[str, Any] = {"key": key, "nonces": nonces, "aads": aads, "chunk_bytes": chunk}
        try:
            self._kernels.open_into(text, tags, out=out, **options)
            is_right = out.cpu().numpy().tobytes() == plain
        except self._kernels.TagMismatchError:
            is_right = False
        text[-1] ^= 1
        try:
            self._kernels.open_into(text, tags, out=torch.empty_like(out), **options)
            is_right = False
        except self._kernels.TagMismatchError:
            pass
        if not is_right:
            raise StartError(f"The kernels that open models are wrong on {device}. Set device_open to 'off'.")

    def serves(self, reader: ShardReader, device: torch.device) -> bool:
        """Whether tensors of this shard are opened on `device` by a kernel."""
        return reader.is_device_openable and device.type == self._device_type

    def open_into(self, reader: ShardReader, name: str, offset: int, destination: torch.Tensor) -> None:
        """Fill `destination`, `[n]` uint8 on the device, with bytes `offset` … of a tensor.

        While one batch is opened, the next is read. Each batch is verified whole before any of it is decrypted.

        Raises:
            SealError: A chunk fails; all of `destination` is zeroed. Kind `payload`.
            StartError: The kernels are wrong on this device.
        """
        if not self._is_checked:
            self.check(destination.device)
            self._is_checked = True
        size = reader.chunk_bytes
        end = offset + destination.numel()
        if not 0 <= offset <= end <= reader.tensor_bytes(name):
            raise ValueError(f"bytes {offset} to {end} are not inside the tensor")
        if offset == end:
            return
        step = max(1, self._batch_bytes // size)
        last = -(-end // size)
        batches = [reader.pieces(name, i, min(i + step, last)) for i in range(offset // size, last, step)]
        try:
            with ThreadPoolExecutor(1, "sealed-read") as pool:
                following: Future[torch.Tensor] = pool.submit(self._read, reader, batches[0])
                start = offset // size * size
                for number, pieces in enumerate(batches):
                    staged = following.result()
                    if number + 1 < len(batches):
                        following = pool.submit(self._read, reader, batches[number + 1])
                    self._open_batch(reader, pieces, staged, start - offset, destination)
                    start += pieces.num_bytes
        except BaseException:
            destination.zero_()
            raise

    def _read(self, reader: ShardReader, pieces: SealedPieces) -> torch.Tensor:
        staged = torch.empty(pieces.num_bytes, dtype=torch.uint8, pin_memory=self._device_type == "cuda")
        reader.read_sealed(pieces, memoryview(staged.numpy()))
        return staged

    def _open_batch(
        self, reader: ShardReader, pieces: SealedPieces, staged: torch.Tensor, at: int, destination: torch.Tensor
    ) -> None:
        """Open `pieces`, whose first byte belongs at `destination[at]`; what sticks out on either side is dropped."""
        low, high = max(at, 0), min(at + pieces.num_bytes, destination.numel())
        target = destination[low:high]
        # A range that cuts a chunk, or a view that no word begins at, goes through memory of the device's own.
        is_direct = high - low == pieces.num_bytes and target.data_ptr() % 4 == target.storage_offset() % 4 == 0
        plain = target if is_direct else torch.empty(pieces.num_bytes, dtype=torch.uint8, device=destination.device)
        try:
            self._kernels.open_into(
                staged.to(destination.device, non_blocking=True),
                pieces.tags,
                key=pieces.key,
                nonces=pieces.nonces,
                aads=pieces.aads,
                out=plain,
                chunk_bytes=pieces.chunk_bytes if len(pieces.nonces) > 1 else None,
            )
        except self._kernels.TagMismatchError as err:
            raise reader.refuse_chunk(pieces.first_chunk + err.chunks[0]) from err
        if not is_direct:
            try:
                target.copy_(plain[low - at : high - at])
            finally:
                plain.zero_()
