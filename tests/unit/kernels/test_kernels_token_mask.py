"""The token mask kernel against its reference, whatever the vocabulary, dtype and layout."""

from __future__ import annotations

import pytest
import torch

from serving_kernels.reference import token_mask as reference
from serving_kernels.token_mask import ban_tokens
from serving_kernels.token_set import NO_SET, is_cheaper_by_index, pack_token_set

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_logits(batch: int, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, num_tokens, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [2, 7, 31, 32, 33, 127, 128, 129, 4096, 49152])
def test_exactly_the_banned_tokens_are_masked(num_tokens, dtype):
    sets = [{0}, set(range(1, num_tokens, 3)) | {num_tokens - 1}]
    packed = torch.stack([pack_token_set(tokens, num_tokens) for tokens in sets])
    logits = random_logits(4, num_tokens, dtype)
    rows = int32(1, NO_SET, 0, 1)
    expected = logits.clone()
    for row, number in enumerate(rows.tolist()):
        if number != NO_SET:
            expected[row, sorted(sets[number])] = float("-inf")
    by_reference = logits.clone()
    reference.ban_tokens(by_reference, packed, rows)
    ban_tokens(logits, packed, rows)
    assert torch.equal(logits, expected)
    assert torch.equal(by_reference, expected)


def test_rows_may_lie_apart_and_what_is_between_them_stays():
    memory = random_logits(3, 200, torch.float32)
    before = memory.clone()
    view = memory[:, 10:139]
    ban_tokens(view, pack_token_set([0, 128], 129)[None], int32(0, 0, 0))
    changed = (memory != before).nonzero().tolist()
    assert changed == [[row, column] for row in range(3) for column in (10, 138)]


def test_the_shape_of_a_device_launch_gives_the_same(monkeypatch):
    monkeypatch.setattr("serving_kernels.token_mask.mask_words", lambda *_, **__: 128)
    logits = random_logits(2, 9000, torch.float32)
    expected = logits.clone()
    tokens = list(range(5, 9000, 7))
    expected[:, tokens] = float("-inf")
    ban_tokens(logits, pack_token_set(tokens, 9000)[None], int32(0, 0))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("number", [2, 1000, -2])
def test_a_set_that_is_not_there_bans_everything_and_reads_nothing(number):
    logits = random_logits(3, 100, torch.float32)
    before = logits.clone()
    ban_tokens(logits, torch.stack([pack_token_set([n], 100) for n in (5, 6)]), int32(NO_SET, number, NO_SET))
    assert torch.isinf(logits[1]).all()
    assert torch.equal(logits[[0, 2]], before[[0, 2]])


def test_an_empty_batch_is_nothing_to_do():
    ban_tokens(torch.empty(0, 10), pack_token_set([1], 10)[None], torch.empty(0, dtype=torch.int32))


@pytest.mark.parametrize("tokens", [[-1], [10], [3, 99]])
def test_a_token_outside_the_vocabulary_is_refused(tokens):
    with pytest.raises(ValueError, match="from 0 to 9"):
        pack_token_set(tokens, 10)


def test_a_set_that_bans_everything_is_refused():
    with pytest.raises(ValueError, match="nothing could be generated"):
        pack_token_set(range(10), 10)


@pytest.mark.parametrize(
    ("logits", "sets", "rows", "message"),
    [
        (torch.zeros(10), torch.zeros(1, 1, dtype=torch.int32), int32(0), r"\[B, V\]"),
        (torch.zeros(1, 10, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int32), int32(0), "fp32"),
        (torch.zeros(10, 2).t(), torch.zeros(1, 1, dtype=torch.int32), int32(0, 0), "contiguous"),
        (torch.zeros(1, 10).expand(2, 10), torch.zeros(1, 1, dtype=torch.int32), int32(0, 0), "share memory"),
        (torch.zeros(1, 33), torch.zeros(1, 1, dtype=torch.int32), int32(0), r"\[S, 2\]"),
        (torch.zeros(1, 10), torch.zeros(1, 1), int32(0), "int32"),
        (torch.zeros(2, 10), torch.zeros(1, 1, dtype=torch.int32), int32(0), r"rows .* \[2\] int32"),
        (torch.zeros(1, 10), torch.zeros(1, 1, dtype=torch.int32, device="meta"), int32(0), "meta"),
    ],
)
def test_what_does_not_fit_is_refused(logits, sets, rows, message):
    with pytest.raises(ValueError, match=message):
        ban_tokens(logits, sets, rows)


@pytest.mark.parametrize(("banned", "expected"), [(0, True), (192, True), (193, False)])
def test_few_tokens_go_by_index(banned, expected):
    assert is_cheaper_by_index(banned, 49152) is expected
