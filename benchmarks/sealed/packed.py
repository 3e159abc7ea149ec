"""Checkpoints in the forms of GPTQ and AWQ, rounded to nearest: what those forms cost, not what calibration gains.

The tools that calibrate don't go with the locked versions (llm-compressor wants older transformers and another
compressed-tensors; gptqmodel has no wheel) or are no longer kept up (auto-gptq, autoawq). Their forms are simple, and a
server reads no more than the form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from server.sealed.format import IndexEntry
from server.sealed.quantize import QuantizedShard, Quantizer

if TYPE_CHECKING:
    from pathlib import Path

    from server.sealed.source import Source

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32}
GROUP = 64  # divides SmolLM2's widths of 576 and 1536; 128 does not
# Column that each four bits of a word hold, lowest first.
GPTQ_ORDER = [0, 1, 2, 3, 4, 5, 6, 7]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(values: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Pack integers of 0 to 15 along the last dimension, eight to a word."""
    words = values.reshape(*values.shape[:-1], -1, 8)[..., order].to(torch.int64)
    packed = (words << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Symmetric, groups of 64, activation order off; words along the input, and a group's number for each input."""

    def plan(self, entry: IndexEntry) -> list[IndexEntry]:
        rows, columns = entry.shape
        stem, groups = entry.name.removesuffix("weight"), columns // GROUP
        return [
            IndexEntry(f"{stem}g_idx", "I32", (columns,), columns * 4),
            IndexEntry(f"{stem}qweight", "I32", (columns // 8, rows), columns * rows // 2),
            IndexEntry(f"{stem}qzeros", "I32", (groups, rows // 8), groups * rows // 2),
            IndexEntry(f"{stem}scales", "F16", (groups, rows), groups * rows * 2),
        ]

    def apply(self, weight: torch.Tensor) -> list[torch.Tensor]:
        rows, columns = weight.shape
        grouped = weight.float().reshape(rows, -1, GROUP)
        scale = (grouped.abs().amax(-1) / 7.5).clamp(min=1e-6).half()
        integers = ((grouped / scale.float()[..., None]).round() + 8).clamp(0, 15).reshape(rows, columns)
        # This form stores the zero point less one.
        zeros = torch.full((columns // GROUP, rows), 7)
        groups = (torch.arange(columns) // GROUP).to(torch.int32)
        return [groups, pack(integers, GPTQ_ORDER).t(), pack(zeros, GPTQ_ORDER), scale.t()]

    def config(self, kept: list[str]) -> dict[str, Any]:
        del kept  # `seal` finds out, as vLLM does with plain files
        return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


@dataclass(frozen=True, slots=True)
class AWQ:
    """With zero points, groups of 64; words along the output, in that form's own order."""

    def plan(self, entry: IndexEntry) -> list[IndexEntry]:
        rows, columns = entry.shape
        stem, groups = entry.name.removesuffix("weight"), columns // GROUP
        return [
            IndexEntry(f"{stem}qweight", "I32", (columns, rows // 8), columns * rows // 2),
            IndexEntry(f"{stem}qzeros", "I32", (groups, rows // 8), groups * rows // 2),
            IndexEntry(f"{stem}scales", "F16", (groups, rows), groups * rows * 2),
        ]

    def apply(self, weight: torch.Tensor) -> list[torch.Tensor]:
        rows, columns = weight.shape
        grouped = weight.float().reshape(rows, -1, GROUP)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-6).half()
        zeros = (-low / scale.float()).round().clamp(0, 15)
        integers = ((grouped / scale.float()[..., None]).round() + zeros[..., None]).clamp(0, 15).reshape(rows, columns)
        return [pack(integers.t(), AWQ_ORDER), pack(zeros.t(), AWQ_ORDER), scale.t()]

    def config(self, kept: list[str]) -> dict[str, Any]:
        del kept  # `seal` finds out, as vLLM does with plain files
        return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


FORMS: dict[str, Quantizer] = {"gptq": GPTQ(), "awq": AWQ()}


def write_checkpoint(folder: Path, source: Source, form: Quantizer) -> None:
    """Write a plain model folder as it would come from elsewhere: its config tells not which layers are packed."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in source.shards:
        packed = QuantizedShard(shard, form)
        for position, entry in enumerate(packed.index.entries):
            data = bytearray(entry.num_bytes)
            packed.read_into(position, 0, memoryview(data))
            tensors[entry.name] = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    config = json.loads(source.files["config.json"]) | {"quantization_config": form.config([])}
    (folder / "config.json").write_text(json.dumps(config))
