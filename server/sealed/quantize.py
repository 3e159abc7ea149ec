"""Quantize a model on its way into the seal: layer by layer in memory, nothing plain on a disk.

Round to nearest, without calibration data. The arithmetic and the packing are those of `compressed-tensors` and
`bitsandbytes`, the libraries whose kernels read the result.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from server.errors import ConfigError
from server.sealed.format import Index, IndexEntry
from server.sealed.source import CONFIG_NAME, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from server.sealed.shard import TensorSource

METHODS: Final = ("w8a8", "w4a16", "bnb-nf4", "bnb-int8")
_GROUP_SIZES: Final = (128, 64, 32)
# Weights of linear layers inside the blocks; embeddings, the head, norms and routers keep their precision.
_LINEAR: Final = re.compile(r"(layers|h|blocks)\.\d+\..*\.weight\Z")
_KEPT: Final = re.compile(r"(embed|lm_head|norm|router|mlp\.gate\.|shared_expert_gate)")
_TORCH_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SAFETENSORS: Final = {f"torch.{name}": key for key, name in _TORCH_DTYPES.items()}


class Quantizer(Protocol):
    """One method: which tensors become of a weight, and how."""

    def plan(self, entry: IndexEntry) -> list[IndexEntry]:
        """Return the entries that take a weight's place."""
        ...

    def apply(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of `plan`, in its order."""
        ...

    def config(self, kept: list[str]) -> dict[str, Any]:
        """Return `quantization_config`; `kept` are the linear layers left alone."""
        ...


def quantize_source(source: Source, method: str) -> Source:
    """Return a source whose linear weights are quantized when they are read.

    Raises:
        ConfigError: An unknown method, a missing library, or a model that is quantized already.
    """
    config = json.loads(source.files.get(CONFIG_NAME, b"{}"))
    if config.get("quantization_config") or config.get("compression_config"):
        raise ConfigError("The model is quantized already. Start from its full-precision weights.")
    quantizer = _quantizer(method, source)
    shards = [QuantizedShard(shard, quantizer) for shard in source.shards]
    if not any(shard.num_quantized for shard in shards):
        raise ConfigError("No linear layer was recognised in this model, so nothing would be quantized.")
    kept = sorted(
        e.name.removesuffix(".weight")
        for s in source.shards
        for e in s.index.entries
        if len(e.shape) == 2 and e.name.endswith("lm_head.weight")
    )
    config["quantization_config"] = quantizer.config(kept or ["lm_head"])
    files = dict(source.files)
    files[CONFIG_NAME] = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()
    return Source(shards, files)


def is_linear(entry: IndexEntry) -> bool:
    """Whether an entry is the weight of a linear layer that is to be quantized."""
    return (
        len(entry.shape) == 2
        and entry.dtype in _TORCH_DTYPES
        and _LINEAR.search(entry.name) is not None
        and _KEPT.search(entry.name) is None
    )


class QuantizedShard:
    """A shard read through a quantizer; holds the tensors of one weight at a time."""

    def __init__(self, shard: TensorSource, quantizer: Quantizer) -> None:
        self._shard = shard
        self._quantizer = quantizer
        self._origins: list[tuple[int, int]] = []
        self._cached: tuple[int, list[memoryview]] = (-1, [])
        entries: list[IndexEntry] = []
        for position, entry in enumerate(shard.index.entries):
            planned = quantizer.plan(entry) if is_linear(entry) else [entry]
            entries += planned
            self._origins += [(position, part) for part in range(len(planned))]
        self.num_quantized = len(entries) - len(shard.index.entries)
        self.index = Index(tuple(entries), shard.index.metadata)

    def read_into(self, position: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a tensor."""
        origin, part = self._origins[position]
        entry = self._shard.index.entries[origin]
        if not is_linear(entry):
            self._shard.read_into(origin, offset, buffer)
            return
        if self._cached[0] != origin:
            self._cached = (origin, self._quantize(origin, entry))
        buffer[:] = self._cached[1][part][offset : offset + len(buffer)]

    def _quantize(self, origin: int, entry: IndexEntry) -> list[memoryview]:
        import torch

        data = bytearray(entry.num_bytes)
        self._shard.read_into(origin, 0, memoryview(data))
        weight = torch.frombuffer(data, dtype=getattr(torch, _TORCH_DTYPES[entry.dtype])).reshape(entry.shape)
        tensors = self._quantizer.apply(weight)
        data[:] = bytes(len(data))
        return [memoryview(t.contiguous().reshape(-1).view(torch.uint8).numpy()) for t in tensors]


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Symmetric integers by `compressed-tensors`: 8 bits a channel with dynamic int8 activations, or 4 bits a group."""

    num_bits: int
    group_size: int | None

    def plan(self, entry: IndexEntry) -> list[IndexEntry]:
        """One integer tensor, its scales, and for packed weights the shape."""
        rows, columns = entry.shape
        stem = entry.name.removesuffix("weight")
        if self.group_size is None:
            return [
                IndexEntry(f"{stem}weight", "I8", (rows, columns), rows * columns),
                IndexEntry(f"{stem}weight_scale", "BF16", (rows, 1), rows * 2),
            ]
        packed, groups = columns * self.num_bits // 32, columns // self.group_size
        return [
            IndexEntry(f"{stem}weight_packed", "I32", (rows, packed), rows * packed * 4),
            IndexEntry(f"{stem}weight_scale", "BF16", (rows, groups), rows * groups * 2),
            IndexEntry(f"{stem}weight_shape", "I64", (2,), 16),
        ]

    def apply(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Scale each channel or group by its largest value, round, and pack."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**self._weights())
        grouped = weight.float().reshape(weight.shape[0], -1, self.group_size or weight.shape[1])
        scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        # The scale is stored in bf16: round it first, so that the integers fit the scale that is used.
        scale = scale.to(torch.bfloat16).float()
        integers = quantize(weight.float(), scale, zero_point, args, dtype=torch.int8)
        if self.group_size is None:
            return [integers, scale.to(torch.bfloat16)]
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return [pack_to_int32(integers, self.num_bits), scale.to(torch.bfloat16), shape]

    def config(self, kept: list[str]) -> dict[str, Any]:
        """Return what vLLM reads."""
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if self.group_size is None else "pack-quantized",
            "quantization_status": "compressed",
            "ignore": kept,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": self._weights(),
                    "input_activations": activations if self.group_size is None else None,
                }
            },
        }

    def _weights(self) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": self.num_bits, "type": "int", "symmetric": True, "dynamic": False}
        if self.group_size is None:
            return weights | {"strategy": "channel"}
        return weights | {"strategy": "group", "group_size": self.group_size}


@dataclass(frozen=True, slots=True)
class BitsAndBytesNF4:
    """Four-bit normal float in blocks of 64 by `bitsandbytes`, in its checkpoint form."""

    block_size: int = 64

    def plan(self, entry: IndexEntry) -> list[IndexEntry]:
        """The packed weight and its quantization state."""
        num_elements = entry.shape[0] * entry.shape[1]
        num_blocks = -(-num_elements // self.block_size)
        state = self._state(entry.shape, entry.dtype)
        return [
            IndexEntry(entry.name, "U8", ((num_elements + 1) // 2, 1), (num_elements + 1) // 2),
            IndexEntry(f"{entry.name}.absmax", "F32", (num_blocks,), num_blocks * 4),
            IndexEntry(f"{entry.name}.quant_map", "F32", (16,), 64),
            IndexEntry(f"{entry.name}.quant_state.bitsandbytes__nf4", "U8", (len(state),), len(state)),
        ]

    def apply(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Quantize on the CPU."""
        import torch
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=self.block_size, quant_type="nf4", compress_statistics=False)
        encoded = self._state(tuple(weight.shape), _SAFETENSORS[str(weight.dtype)])
        blob = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return [packed, state.absmax.float(), state.code.float(), blob]

    def config(self, kept: list[str]) -> dict[str, Any]:
        """Return what vLLM reads."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }

    def _state(self, shape: tuple[int, ...], dtype: str) -> bytes:
        return json.dumps(
            {"quant_type": "nf4", "blocksize": self.block_size, "dtype": _TORCH_DTYPES[dtype], "shape": list(shape)}
        ).encode()


class BitsAndBytesInt8:
    """LLM.int8() by `bitsandbytes`: 8 bits a row."""

    def plan(self, entry: IndexEntry) -> list[IndexEntry]:
        """The integers and a scale a row."""
        rows, columns = entry.shape
        return [
            IndexEntry(entry.name, "I8", (rows, columns), rows * columns),
            IndexEntry(f"{entry.name.removesuffix('weight')}SCB", "F32", (rows,), rows * 4),
        ]

    def apply(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Quantize on the CPU."""
        import torch
        from bitsandbytes.functional import int8_vectorwise_quant

        integers, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return [integers, scale.float()]

    def config(self, kept: list[str]) -> dict[str, Any]:
        """Return what vLLM reads."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_skip_modules": kept,
        }


def _quantizer(method: str, source: Source) -> Quantizer:
    try:
        if method.startswith("bnb-"):
            import bitsandbytes  # noqa: F401 - tells early that it is missing
        else:
            import compressed_tensors  # noqa: F401
    except ImportError as err:
        raise ConfigError(f"The method {method} needs the package {err.name}: install strongroom[engine-cpu].") from err
    if method == "w8a8":
        return CompressedTensors(8, None)
    if method == "w4a16":
        return CompressedTensors(4, _group_size(source))
    if method == "bnb-nf4":
        return BitsAndBytesNF4()
    if method == "bnb-int8":
        return BitsAndBytesInt8()
    raise ConfigError(f"The method {method!r} is not known. Choose one of {', '.join(METHODS)}.")


def _group_size(source: Source) -> int:
    columns: Sequence[int] = [e.shape[1] for s in source.shards for e in s.index.entries if is_linear(e)]
    for size in _GROUP_SIZES:
        if all(c % size == 0 for c in columns):
            return size
    raise ConfigError(f"The layers' widths are no multiples of {_GROUP_SIZES[-1]}; w4a16 can't group them. Use w8a8.")
