"""Sets of tokens as bits, one row a set; what the token mask kernel and its reference read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

NO_SET = -1


def pack_token_set(tokens: Iterable[int], num_tokens: int) -> Tensor:
    """Return `[ceil(V / 32)]` int32 on the CPU, bit `v % 32` of word `v // 32` set for each token `v`.

    Raises:
        ValueError: A token is not in the vocabulary, or none would be left to say.
    """
    wanted = sorted(set(tokens))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < num_tokens:
        raise ValueError(f"Token ids run from 0 to {num_tokens - 1}; a set to ban holds {wanted[0]} to {wanted[-1]}.")
    if len(wanted) >= num_tokens:
        raise ValueError(f"All {num_tokens} tokens would be banned; nothing could be generated.")
    bits = torch.zeros(-(-num_tokens // 32) * 32, dtype=torch.int64)
    bits[torch.tensor(wanted, dtype=torch.int64)] = 1
    words = (bits.view(-1, 32) << torch.arange(32)).sum(dim=1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def is_cheaper_by_index(num_banned: int, num_tokens: int) -> bool:
    """Whether writing banned logits by index moves fewer bytes than the mask kernel.

    By index a token costs a 32-byte sector; the kernel reads an eighth of a byte for each token of the vocabulary.
    """
    return num_banned * 32 * 8 <= num_tokens
