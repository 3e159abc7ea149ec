"""A tensor that is still sealed: it decrypts into its destination when it is copied there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch.utils._pytree import tree_map
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

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


class SealedTensor(torch.Tensor):
    """Shape and dtype of a tensor of a shard, or of a contiguous part of one; no storage.

    `parameter.copy_(sealed)` decrypts straight into the parameter where shape and dtype are equal and it is
    contiguous, on the CPU or on a device that `opener` serves; views that stay contiguous stay sealed. Any other
    operation works on a tensor decrypted for it alone.

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
        tensor: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        tensor._reader, tensor._name, tensor._offset, tensor._opener = reader, name, offset, opener
        return tensor

    def part(self, offset_elements: int, shape: tuple[int, ...]) -> SealedTensor:
        """Return a contiguous part that begins `offset_elements` further on."""
        offset = self._offset + offset_elements * self.dtype.itemsize
        return SealedTensor(self._reader, self._name, offset, shape, self.dtype, self._opener)

    def is_opened_on(self, device: torch.device) -> bool:
        """Whether ciphertext is what goes to `device`, to be opened there."""
        return self._opener is not None and self._opener.serves(self._reader, device)

    def decrypt_into(self, destination: torch.Tensor) -> None:
        """Fill a contiguous tensor of the same shape and dtype, on the CPU or on a device that the opener serves."""
        if not destination.numel():
            return
        if self._opener is not None and self._opener.serves(self._reader, destination.device):
            flat = destination.detach().reshape(-1).view(torch.uint8)
            self._opener.open_into(self._reader, self._name, self._offset, flat)
        else:
            self._reader.read_into(self._name, as_memory(destination), self._offset)

    def decrypt(self, device: torch.device | None = None) -> torch.Tensor:
        """Return an ordinary tensor of its own memory, on the CPU unless told; its lifetime is the caller's affair."""
        plain = torch.empty(self.shape, dtype=self.dtype, device=device or "cpu")
        self.decrypt_into(plain)
        return plain

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
        if handler := _HANDLERS.get(func):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(lambda a: a.decrypt() if isinstance(a, SealedTensor) else a, (args, kwargs))
        return func(*args, **kwargs)


def as_memory(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's own memory as bytes."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _copy(destination: torch.Tensor, source: Any, non_blocking: bool = False) -> Any:
    if isinstance(destination, SealedTensor) or not isinstance(source, SealedTensor):
        return NotImplemented
    is_direct = destination.device.type == "cpu" or source.is_opened_on(destination.device)
    if (
        is_direct
        and destination.shape == source.shape
        and destination.dtype == source.dtype
        and destination.is_contiguous()
    ):
        source.decrypt_into(destination)
        return destination
    # Where a device opens, even the staging tensor is the device's: host memory never holds the plaintext.
    plain = source.decrypt(destination.device if is_direct else None)
    try:
        # Never asynchronous: the staging tensor is wiped right after.
        return destination.copy_(plain)
    finally:
        plain.zero_()


def _same(source: Any) -> Any:
    return source.part(0, tuple(source.shape))


def _view(source: Any, shape: Any) -> Any:
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = source.numel() // known if known else 0
    return source.part(0, tuple(sizes)) if math.prod(sizes) == source.numel() else NotImplemented


def _slice(source: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    shape = list(source.shape)
    dim %= len(shape)
    first, last, _ = slice(start, end).indices(shape[dim])
    if step != 1 or (dim != 0 and (first, last) != (0, shape[dim])):
        return NotImplemented
    shape[dim] = max(0, last - first)
    return source.part(first * math.prod(shape[dim + 1 :]) if dim == 0 else 0, tuple(shape))


def _select(source: Any, dim: int, index: int) -> Any:
    if dim % source.dim() != 0 or not -source.shape[0] <= index < source.shape[0]:
        return NotImplemented
    rest = tuple(source.shape[1:])
    return source.part(index % source.shape[0] * math.prod(rest), rest)


_aten: Any = torch.ops.aten
_HANDLERS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.copy_.default: _copy,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.view.default: _view,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
}
