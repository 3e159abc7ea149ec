"""Ban tokens: set a logit to minus infinity where its bit stands in the row's token set.

A set is one bit a token, so a row of 128,000 logits costs 16 kB of reading and a write for each banned token; a boolean
mask and `masked_fill_` read and write every logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving_kernels.launch import INTERPRETED, jit, mask_words

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@jit
def mask_logits(logits_ptr, set_ptr, row_ptr, row_stride, num_sets, num_words, num_tokens, WORDS: tl.constexpr) -> None:
    """Write logits[b, v] = -inf where bit v of sets[rows[b]] is 1; no other logit is touched, and none is read.

    A row that names no set there is bans everything: such a mistake is seen, and reads nothing.
    """
    batch = tl.program_id(0)
    row = tl.load(row_ptr + batch)
    if row != -1:
        at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
        number = row + at * 0
        mask = (number >= 0) & (number < num_sets) & (at < num_words)
        words = tl.load(set_ptr + row.to(tl.int64) * num_words + at, mask=mask, other=-1)
        bit = tl.arange(0, 32)[None, :]
        token = at[:, None] * 32 + bit
        banned = ((words[:, None] >> bit) & 1) != 0
        logits = logits_ptr + batch.to(tl.int64) * row_stride + token
        tl.store(logits, float("-inf"), mask=banned & (token < num_tokens))


def ban_tokens(logits: Tensor, sets: Tensor, rows: Tensor) -> None:
    """Set the logits of banned tokens to minus infinity, in place.

    Args:
        logits: `[B, V]` fp32, bf16 or fp16, contiguous in the last dimension; no two rows share memory.
        sets: `[S, ceil(V / 32)]` int32, contiguous; rows of `token_set.pack_token_set`.
        rows: `[B]` int32, contiguous; which set applies to each row, `token_set.NO_SET` for none. A number that no set
            has bans every token of its row: on a device it is not looked at before.

    Raises:
        ValueError: A shape, dtype, stride or device does not fit.
    """
    if logits.dim() != 2 or logits.dtype not in _DTYPES or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits is {logits.dtype} of shape {list(logits.shape)}, stride {list(logits.stride())}; it must be "
            "[B, V], fp32, bf16 or fp16, contiguous in the last dimension."
        )
    batch, num_tokens = logits.shape
    if batch > 1 and logits.stride(0) < num_tokens:
        raise ValueError(f"logits has rows {logits.stride(0)} apart that are {num_tokens} long; they share memory.")
    num_words = -(-num_tokens // 32)
    if sets.dtype != torch.int32 or sets.dim() != 2 or sets.shape[1] != num_words or not sets.is_contiguous():
        raise ValueError(f"sets is {sets.dtype} of shape {list(sets.shape)}; it must be [S, {num_words}] int32.")
    if rows.dtype != torch.int32 or rows.shape != (batch,) or not rows.is_contiguous():
        raise ValueError(f"rows is {rows.dtype} of shape {list(rows.shape)}; it must be [{batch}] int32.")
    if not logits.device == sets.device == rows.device or logits.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise ValueError(f"logits, sets and rows are on {logits.device}, {sets.device} and {rows.device}.")
    if batch == 0 or num_tokens == 0:
        return
    words = mask_words(num_words, interpreted=INTERPRETED)
    mask_logits[(batch, triton.cdiv(num_words, words))](
        logits, sets, rows, logits.stride(0), sets.shape[0], num_words, num_tokens, WORDS=words, num_warps=4
    )
