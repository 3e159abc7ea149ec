"""A matrix of four-bit weights as two published formats lay it out; validated once, read by kernels and reference."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# QLoRA (Dettmers et al. 2023), appendix E; the same fp32 values that bitsandbytes 0.50 holds.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
INT4_ZERO = 8
WORD_WEIGHTS = 8


class Format(StrEnum):
    """How a nibble becomes a number, and which nibble comes first."""

    NF4 = "nf4"
    INT4 = "int4"


class Activation(StrEnum):
    """What is applied to the product plus bias.

    `silu_and_mul` is the gated form: of rows `[gate; up]`, the result is `silu(gate) * up`, half as long.
    """

    NONE = "none"
    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    SILU_AND_MUL = "silu_and_mul"


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """`[N, K]` weights.

    Attributes:
        kind: The format.
        words: `[N, K / 8]` int32, contiguous; eight weights a word.
        scales: `[N, K / group]`, contiguous; fp32 for NF4, bf16, fp16 or fp32 for int4.

    Raises:
        ValueError: A shape, dtype or stride does not fit.
    """

    kind: Format
    words: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        """Refuse what the kernels could not read."""
        words, scales = self.words, self.scales
        if words.dtype != torch.int32 or words.dim() != 2 or not words.is_contiguous() or not words.numel():
            raise ValueError(
                f"words is {words.dtype} of shape {list(words.shape)}; it must be contiguous [N, K/8] int32."
            )
        if scales.dim() != 2 or scales.shape[0] != words.shape[0] or not scales.is_contiguous() or not scales.numel():
            raise ValueError(f"scales is {list(scales.shape)}; it must be contiguous [{words.shape[0]}, groups].")
        if not scales.dtype.is_floating_point or (self.kind is Format.NF4 and scales.dtype != torch.float32):
            raise ValueError(f"scales is {scales.dtype}; NF4 takes fp32, int4 any floating type.")
        num_columns, num_groups = words.shape[1] * WORD_WEIGHTS, scales.shape[1]
        if num_columns % num_groups or (num_columns // num_groups) % WORD_WEIGHTS:
            raise ValueError(f"{num_columns} columns in {num_groups} groups: a group must be a multiple of 8 columns.")
        if words.device != scales.device:
            raise ValueError(f"words is on {words.device} and scales on {scales.device}.")

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.words.shape[0], self.words.shape[1] * WORD_WEIGHTS

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // int(self.scales.shape[1])


def from_bitsandbytes(packed: Tensor, absmax: Tensor, shape: tuple[int, int]) -> FourBitWeight:
    """Take over an NF4 matrix of bitsandbytes without copying it.

    Args:
        packed: What `quantize_4bit` returns, uint8, two weights a byte.
        absmax: Its fp32 scales; nested ones must have been dequantized.
        shape: `(N, K)`.

    Raises:
        ValueError: Rows are not whole words or not whole blocks, so that a scale would belong to two rows; or the
            memory is not contiguous or begins inside a word.
    """
    rows, columns = shape
    blocks = absmax.numel()
    if rows < 1 or not packed.is_contiguous() or not absmax.is_contiguous() or packed.storage_offset() % 4:
        raise ValueError("packed and absmax must be contiguous, rows at least one, and packed must begin at a word.")
    if packed.dtype != torch.uint8 or packed.numel() * 2 != rows * columns or columns % WORD_WEIGHTS:
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} are not {rows} rows of {columns} weights.")
    if blocks % rows:
        raise ValueError(
            f"{blocks} blocks do not divide into {rows} rows; columns must be a multiple of the block size."
        )
    words = packed.view(-1).view(torch.int32).view(rows, columns // WORD_WEIGHTS)
    return FourBitWeight(Format.NF4, words, absmax.view(rows, blocks // rows))
