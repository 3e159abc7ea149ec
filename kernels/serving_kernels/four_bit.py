"""Weights of four bits: dequantize them, or multiply one token's vector with them, bias and activation included.

Both kernels read eight weights an int32 word. In the product a group's scale is applied once a word, and weights are
never rounded to the activations' type on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving_kernels import launch
from serving_kernels.four_bit_weight import NF4_LEVELS, Activation, Format, FourBitWeight
from serving_kernels.launch import INTERPRETED, GemvPlan, block_sum, jit

MAX_GRID_Y = 65_535  # CUDA's limit of a grid's second dimension, in which a product's rows lie.
MAX_ROWS = 8  # Each row of x reads all weights once more, from cache; for more, a matrix product is the right kernel.
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ACTIVATION_CODES = {kind: code for code, kind in enumerate(Activation)}


@jit
def _level(words, place: tl.constexpr, table_ptr, NF4: tl.constexpr):
    """Value of weight `place` (0 to 7) of each of `words`, unsigned, before its scale."""
    if NF4:
        # The high nibble of a byte comes first: weight 0 is in bits 4 to 7, weight 1 in bits 0 to 3.
        return tl.load(table_ptr + ((words >> (4 * (place ^ 1))) & 15))
    # A nibble in the mantissa of 2^23 is exact, and cheaper than a conversion.
    return (((words >> (4 * place)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@jit
def _load_vector(ptr, at, mask, WORDS: tl.constexpr):
    """Load the activations that go with the weights of each word: eight tensors, one a place."""
    both = tl.load(ptr + (at * 8)[:, None] + tl.arange(0, 8)[None, :], mask=mask[:, None], other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(both, (WORDS, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def _dot(signed, vector, table_ptr, NF4: tl.constexpr):
    """Sum over the eight weights of each word of level * x."""
    words = signed.to(tl.uint32, bitcast=True)
    total = vector[0][None, :] * _level(words, 0, table_ptr, NF4)
    for place in tl.static_range(1, 8):
        total += vector[place][None, :] * _level(words, place, table_ptr, NF4)
    return total


@jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); the exponent is never positive, so it cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@jit
def _round(values, ptr):
    """Round to nearest even, to what `ptr` points to."""
    if _INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts where a device rounds; after this there is nothing left to cut.
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(ptr.dtype.element_ty)


@jit
def dequantize_words(
    word_ptr, scale_ptr, table_ptr, out_ptr, num_words, group_words, WORDS: tl.constexpr, NF4: tl.constexpr
) -> None:  # fmt: skip
    """Write out = level * scale for eight weights a word; the product is rounded once, as it is stored."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    mask = at < num_words
    words = tl.load(word_ptr + at, mask=mask, other=0)
    scale = tl.load(scale_ptr + at // group_words, mask=mask, other=0).to(tl.float32)
    unsigned = words.to(tl.uint32, bitcast=True)
    v0, v4 = _level(unsigned, 0, table_ptr, NF4) * scale, _level(unsigned, 4, table_ptr, NF4) * scale
    v1, v5 = _level(unsigned, 1, table_ptr, NF4) * scale, _level(unsigned, 5, table_ptr, NF4) * scale
    v2, v6 = _level(unsigned, 2, table_ptr, NF4) * scale, _level(unsigned, 6, table_ptr, NF4) * scale
    v3, v7 = _level(unsigned, 3, table_ptr, NF4) * scale, _level(unsigned, 7, table_ptr, NF4) * scale
    pairs = tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    values = tl.reshape(pairs, (WORDS, 8))
    tl.store(out_ptr + (at * 8)[:, None] + tl.arange(0, 8)[None, :], _round(values, out_ptr), mask=mask[:, None])


@jit
def multiply_vector(
    x_ptr, word_ptr, scale_ptr, table_ptr, bias_ptr, out_ptr, num_rows, row_words, group_words,
    ROWS: tl.constexpr, WORDS: tl.constexpr, NF4: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
) -> None:  # fmt: skip
    """Write out[m, n] = activation(sum_k x[m, k] * level[n, k] * scale[n, k / G] + bias[n]); sums in fp32."""
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    row_groups = row_words // group_words
    x = x_ptr + token.to(tl.int64) * row_words * 8
    word = tl.arange(0, WORDS)
    total = tl.full([ROWS, WORDS], 0.0, dtype=tl.float32)
    other = tl.full([ROWS, WORDS], 0.0, dtype=tl.float32)
    base = row.to(tl.int64)[:, None]
    for start in range(0, row_words, WORDS):
        at = start + word
        mask = row_mask[:, None] & (at < row_words)[None, :]
        words = tl.load(word_ptr + base * row_words + at[None, :], mask=mask, other=0)
        scale_at = scale_ptr + base * row_groups + (at // group_words)[None, :]
        scale = tl.load(scale_at, mask=mask, other=0).to(tl.float32)
        vector = _load_vector(x, at, at < row_words, WORDS)
        total += _dot(words, vector, table_ptr, NF4) * scale
        if ACTIVATION == 3:
            far = num_rows.to(tl.int64)
            words = tl.load(word_ptr + (base + far) * row_words + at[None, :], mask=mask, other=0)
            scale = tl.load(scale_at + far * row_groups, mask=mask, other=0).to(tl.float32)
            other += _dot(words, vector, table_ptr, NF4) * scale
    value = block_sum(total, 1)
    if BIAS:
        value += tl.load(bias_ptr + row, mask=row_mask, other=0).to(tl.float32)
    if ACTIVATION == 1:
        value = value * _sigmoid(value)
    if ACTIVATION == 2:
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        value = value * _sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    if ACTIVATION == 3:
        up = block_sum(other, 1)
        if BIAS:
            up += tl.load(bias_ptr + num_rows + row, mask=row_mask, other=0).to(tl.float32)
        value = value * _sigmoid(value) * up
    tl.store(out_ptr + token.to(tl.int64) * num_rows + row, _round(value, out_ptr), mask=row_mask)


def dequantize(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Return `[N, K]`, new, level times scale in fp32 rounded once to `dtype`.

    Raises:
        ValueError: The dtype or the device does not fit.
    """
    _check_device(weight.words)
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype} is not one of bf16, fp16 and fp32.")
    out = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    num_words = weight.words.numel()
    words = launch.dequantize_words(num_words, interpreted=INTERPRETED)
    dequantize_words[(triton.cdiv(num_words, words),)](
        weight.words, weight.scales, _table(weight), out, num_words, weight.group_size // 8,
        WORDS=words, NF4=weight.kind is Format.NF4, num_warps=4,
    )  # fmt: skip
    return out


def multiply(
    x: Tensor,
    weight: FourBitWeight,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    plan: GemvPlan | None = None,
) -> Tensor:
    """Multiply a few tokens' vectors with four-bit weights, for decode.

    Args:
        x: `[M, K]` bf16, fp16 or fp32, contiguous, M at most `MAX_ROWS`.
        weight: `[N, K]`; `[2 N, K]`, gate before up, for `Activation.SILU_AND_MUL`.
        bias: As long as the weight has rows, contiguous; None for none.
        activation: Applied to the sum, in fp32.
        plan: Launch shape; None for the one that `launch.gemv_plan` chooses.

    Returns:
        `[M, N]`, new, dtype of `x`; sums are kept in fp32.

    Raises:
        ValueError: A shape, dtype, stride or device does not fit.
    """
    _check_device(weight.words)
    rows, columns = weight.shape
    is_gated = activation is Activation.SILU_AND_MUL
    if x.dtype not in _DTYPES or x.dim() != 2 or x.shape[1] != columns or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}; it must be contiguous [M, {columns}].")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {x.shape[0]} rows; this kernel takes 1 to {MAX_ROWS}.")
    if is_gated and rows % 2:
        raise ValueError(f"A gated activation needs as many gate as up rows; there are {rows} in all.")
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous() or not bias.dtype.is_floating_point):
        raise ValueError(f"bias is {bias.dtype} of shape {list(bias.shape)}; it must be contiguous [{rows}].")
    if any(t is not None and t.device != weight.words.device for t in (x, bias)):
        raise ValueError(f"x, weight and bias must all be on {weight.words.device}.")
    num_out = rows // 2 if is_gated else rows
    out = torch.empty(x.shape[0], num_out, dtype=x.dtype, device=x.device)
    plan = plan or launch.gemv_plan(num_out, columns // 8, is_gated=is_gated, interpreted=INTERPRETED)
    if triton.cdiv(num_out, plan.rows) > MAX_GRID_Y:
        raise ValueError(f"The weight has {num_out} rows of results; at most {MAX_GRID_Y * plan.rows} fit a launch.")
    # Tokens are the fastest grid dimension: programs that want the same weights run together and share the cache.
    multiply_vector[(x.shape[0], triton.cdiv(num_out, plan.rows))](
        x, weight.words, weight.scales, _table(weight), x if bias is None else bias, out, num_out, columns // 8,
        weight.group_size // 8, ROWS=plan.rows, WORDS=plan.words, NF4=weight.kind is Format.NF4, BIAS=bias is not None,
        ACTIVATION=_ACTIVATION_CODES[activation], num_warps=plan.warps,
    )  # fmt: skip
    return out


def _table(weight: FourBitWeight) -> Tensor:
    """The NF4 levels on the weight's device; int4 needs none and gets what there is."""
    if weight.kind is Format.NF4:
        return _levels_on(weight.words.device)
    return weight.scales


_LEVELS: dict[torch.device, Tensor] = {}


def _levels_on(device: torch.device) -> Tensor:
    """Sixteen constants, copied to each device once."""
    if device not in _LEVELS:
        _LEVELS[device] = torch.tensor(NF4_LEVELS, device=device)
    return _LEVELS[device]


def _check_device(tensor: Tensor) -> None:
    expected = "cpu" if INTERPRETED else "cuda"
    if tensor.device.type != expected:
        raise ValueError(f"The weight is on {tensor.device}; this process runs its kernels on {expected}.")
