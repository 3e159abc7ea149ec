"""A tensor that is still sealed: it decrypts into its destination when it is copied there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import numpy
import torch
from torch.utils._pytree import tree_map
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from server.engine.vllm.device_open import DeviceOpener
    from server.sealed.shard import ShardReader

DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# What is opened at once where the bytes can't go straight to their place. It is all the plaintext there is outside of
# the destination, in host memory or, where a device opens, in the device's.
HOST_SCRATCH_BYTES: Final = 8 << 20
DEVICE_SCRATCH_BYTES: Final = 256 << 20


class SealedTensor(torch.Tensor):
    """Shape, strides and dtype of a tensor of a shard, or of a view of one; no storage.

    `parameter.copy_(sealed)` decrypts straight into the parameter where shape and dtype are equal and both are
    contiguous, on the CPU or on a device that `opener` serves. Views stay sealed: of a slice along any dimension no
    more is opened than lies between its bytes, a bounded piece at a time, and the pieces are wiped. Any other operation
    works on a tensor decrypted for it alone.

    Args:
        reader: The shard; must stay open as long as this tensor may be used.
        name: The tensor's name in it.
        offset: Byte at which this part begins.
        shape: Of this part.
        dtype: Of the tensor.
        opener: Opens on the device; None where only the CPU does.
    """

    _reader: ShardReader
    _opener: DeviceOpener | None
    _name: str
    _offset: int
    _layout: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls: type[Self],
        reader: ShardReader,
        name: str,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        opener: DeviceOpener | None = None,
    ) -> Self:
        """Make the wrapper; torch asks for `__new__`."""
        return cls._wrap(reader, name, offset, torch.empty(shape, dtype=dtype, device="meta"), opener)

    @classmethod
    def _wrap(
        cls, reader: ShardReader, name: str, offset: int, layout: torch.Tensor, opener: DeviceOpener | None
    ) -> Self:
        tensor: Self = torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, strides=layout.stride(), dtype=layout.dtype, device="cpu"
        )
        tensor._reader, tensor._name, tensor._offset, tensor._opener = reader, name, offset, opener
        tensor._layout = layout  # no memory: torch itself works out what a view of a view is
        return tensor

    def viewed(self, layout: torch.Tensor) -> SealedTensor:
        """Return a view of the same sealed bytes; `layout` is what the operation made of this one's."""
        return SealedTensor._wrap(self._reader, self._name, self._offset, layout, self._opener)

    def is_opened_on(self, device: torch.device) -> bool:
        """Whether ciphertext is what goes to `device`, to be opened there."""
        return self._opener is not None and self._opener.serves(self._reader, device)

    def decrypt_into(self, destination: torch.Tensor) -> None:
        """Fill a tensor of the same shape, whatever its dtype, layout and device.

        Raises:
            SealError: A chunk fails; all of `destination` is zeroed.
        """
        if not self.numel():
            return
        try:
            self._fill(destination.detach(), self._layout)
        except BaseException:
            destination.detach().zero_()
            raise

    def decrypt(self, device: torch.device | None = None) -> torch.Tensor:
        """Return an ordinary tensor of its own memory, on the CPU unless told; there it is wiped after its last use."""
        if (device is not None and device.type != "cpu") or not self.numel():
            plain = torch.empty(self.shape, dtype=self.dtype, device=device)
        else:
            memory = _WipedMemory(self.numel() * self.dtype.itemsize, dtype=numpy.uint8)
            plain = torch.frombuffer(memory, dtype=torch.uint8).view(self.dtype).reshape(self.shape)
        self.decrypt_into(plain)
        return plain

    def _fill(self, destination: torch.Tensor, layout: torch.Tensor) -> None:
        is_on_device = self.is_opened_on(destination.device)
        is_same = destination.dtype == layout.dtype and destination.is_contiguous() and layout.is_contiguous()
        if is_same and (is_on_device or destination.device.type == "cpu"):
            self._open(as_bytes(destination), layout)
            return
        limit_bytes = DEVICE_SCRATCH_BYTES if is_on_device else HOST_SCRATCH_BYTES
        if cut := find_cut(layout, limit_bytes, self._reader.chunk_bytes):
            dim, num_rows = cut
            for rows, part in zip(destination.split(num_rows, dim), layout.split(num_rows, dim), strict=True):
                self._fill(rows, part)
            return
        scratch = new_scratch(span(layout), layout.dtype, destination.device if is_on_device else torch.device("cpu"))
        try:
            self._open(as_bytes(scratch), layout)
            # Never asynchronous: the scratch is wiped right after.
            destination.copy_(scratch.as_strided(layout.shape, layout.stride()))
        finally:
            scratch.zero_()

    def _open(self, destination: torch.Tensor, layout: torch.Tensor) -> None:
        """Fill `destination`, bytes, with those from the first to the last that `layout` reaches."""
        offset = self._offset + layout.storage_offset() * layout.dtype.itemsize
        if self._opener is not None and self._opener.serves(self._reader, destination.device):
            self._opener.open_into(self._reader, self._name, offset, destination)
        else:
            self._reader.read_into(self._name, memoryview(destination.numpy()), offset)

    @override
    def __repr__(self, **_: Any) -> str:
        return f"SealedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation that has a sealed tensor among its arguments."""
        del types
        kwargs = kwargs or {}
        if func in _VIEWS and isinstance(source := args[0], SealedTensor):
            return tree_map(source.viewed, func(source._layout, *args[1:], **kwargs))
        if handler := _HANDLERS.get(func):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result

        def open_one(value: Any) -> Any:
            return value.decrypt() if isinstance(value, SealedTensor) else value

        args, kwargs = tree_map(open_one, (args, kwargs))
        return func(*args, **kwargs)


class _WipedMemory(numpy.ndarray[Any, Any]):
    """Memory that is zeroed once nothing refers to it any more.

    A tensor made from it by `torch.frombuffer` and every view of that refer to it. So plaintext that a loader keeps is
    left alone, for as long as it likes, and what it lets go of is gone.
    """

    def __del__(self) -> None:
        """Zero it, just before it is freed."""
        if self.base is None:  # not where a slice of it dies
            self.fill(0)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's own memory as bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def storages(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Return (address, bytes) of the host memory behind tensors, each piece once, in their order."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            storage = tensor.detach().untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return list(found.items())


def new_scratch(num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory for plaintext on its way; whoever asks for it wipes it."""
    return torch.empty(num_elements, dtype=dtype, device=device)


def span(layout: torch.Tensor) -> int:
    """Return how many elements lie from the first of a view to its last, those between that it leaves out too."""
    num_between: int = sum((size - 1) * stride for size, stride in zip(layout.shape, layout.stride(), strict=True))
    return num_between + 1


def find_cut(layout: torch.Tensor, limit_bytes: int, chunk_bytes: int) -> tuple[int, int] | None:
    """Return a dimension and how many of its rows to open at a time; None where all may be opened at once.

    Rows with whole chunks between them are opened one by one, since others can be left sealed. Where pieces can begin
    at the beginning of a chunk they do: a chunk that two of them share is opened twice.
    """
    strides = [stride if size > 1 else 0 for size, stride in zip(layout.shape, layout.stride(), strict=True)]
    if not any(strides):
        return None
    dim = strides.index(max(strides))
    item_bytes, stride_bytes = layout.dtype.itemsize, strides[dim] * layout.dtype.itemsize
    row_bytes = span(layout.narrow(dim, 0, 1)) * item_bytes
    if stride_bytes - row_bytes >= chunk_bytes:
        return dim, 1
    if span(layout) * item_bytes <= limit_bytes:
        return None
    num_rows = 1 + max(0, limit_bytes - row_bytes) // stride_bytes
    if chunk_bytes % stride_bytes == 0 and (chunk_rows := chunk_bytes // stride_bytes) <= num_rows:
        num_rows -= num_rows % chunk_rows
    return dim, num_rows


def _copy(destination: torch.Tensor, source: Any, non_blocking: bool = False) -> Any:
    if isinstance(destination, SealedTensor) or not isinstance(source, SealedTensor):
        return NotImplemented
    if destination.shape == source.shape:
        source.decrypt_into(destination)
        return destination
    # Broadcast, of something small as a rule.
    plain = source.decrypt(destination.device if source.is_opened_on(destination.device) else None)
    try:
        return destination.copy_(plain)
    finally:
        if plain.device.type != "cpu":  # there it is wiped by itself
            plain.zero_()


def _to_copy(source: Any, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    plain = torch.empty(source.shape, dtype=dtype or source.dtype, device=device or "cpu")
    source.decrypt_into(plain)
    return plain


_aten: Any = torch.ops.aten
_VIEWS: Final[frozenset[Any]] = frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.squeeze.dim,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
_HANDLERS: Final[dict[Any, Callable[..., Any]]] = {_aten.copy_.default: _copy, _aten._to_copy.default: _to_copy}
