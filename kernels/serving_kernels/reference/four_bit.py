"""Four-bit weights in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from serving_kernels.four_bit_weight import INT4_ZERO, NF4_LEVELS, Activation, Format

if TYPE_CHECKING:
    from torch import Tensor

    from serving_kernels.four_bit_weight import FourBitWeight


def dequantize(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Return `[N, K]`: level times scale in fp32, rounded once to `dtype`."""
    places = torch.arange(8, device=weight.words.device)
    if weight.kind is Format.NF4:
        places ^= 1  # The high nibble of a byte comes first.
    nibbles = (weight.words[:, :, None] >> (4 * places)) & 15
    if weight.kind is Format.NF4:
        levels = torch.tensor(NF4_LEVELS, device=weight.words.device)[nibbles.long()]
    else:
        levels = (nibbles - INT4_ZERO).float()
    rows, columns = weight.shape
    grouped = levels.reshape(rows, -1, weight.group_size) * weight.scales.float()[:, :, None]
    return grouped.reshape(rows, columns).to(dtype)


def activate(values: Tensor, activation: Activation) -> Tensor:
    """Apply `activation` along the last dimension."""
    if activation is Activation.SILU:
        return functional.silu(values)
    if activation is Activation.GELU_TANH:
        return functional.gelu(values, approximate="tanh")
    if activation is Activation.SILU_AND_MUL:
        gate, up = values.chunk(2, dim=-1)
        return functional.silu(gate) * up
    return values


def multiply(
    x: Tensor, weight: FourBitWeight, *, bias: Tensor | None = None, activation: Activation = Activation.NONE
) -> Tensor:
    """Return `activation(x @ weight.T + bias)` in the dtype of `x`; all sums in fp64, rounded once."""
    sums = x.double() @ dequantize(weight, torch.float32).double().T
    if bias is not None:
        sums = sums + bias.double()
    return activate(sums, activation).to(x.dtype)
