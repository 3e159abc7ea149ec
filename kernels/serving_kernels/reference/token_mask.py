"""Ban tokens, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def ban_tokens(logits: Tensor, sets: Tensor, rows: Tensor) -> None:
    """Set the logits of banned tokens to minus infinity, in place; shapes as in `serving_kernels.token_mask`."""
    num_tokens = logits.shape[1]
    bits = (sets[:, :, None] >> torch.arange(32, dtype=torch.int32, device=sets.device)) & 1
    banned = bits.reshape(sets.shape[0], -1)[:, :num_tokens].bool()
    # A row without a set is -1 and would be the last one: its mask is taken, then cleared.
    logits.masked_fill_(banned[rows.long()] & (rows >= 0)[:, None], float("-inf"))
