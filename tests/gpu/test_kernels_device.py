"""The kernels compiled and run on a device against their references; `make test-gpu`."""

from __future__ import annotations

import os
import secrets
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from serving_kernels import chacha20_poly1305, four_bit, token_mask
from serving_kernels.four_bit_weight import Activation, Format, FourBitWeight
from serving_kernels.reference import four_bit as four_bit_reference
from serving_kernels.reference import token_mask as token_mask_reference
from serving_kernels.token_set import NO_SET, pack_token_set

pytestmark = pytest.mark.gpu
# Another device (`cpu`: the interpreter) only to see that these tests themselves are in order.
DEVICE = torch.device(os.environ.get("STRONGROOM_TEST_DEVICE", "cuda"))
CHUNK = 1 << 16


def seal(num_bytes: int) -> tuple[bytes, torch.Tensor, dict[str, Any]]:
    """Random plaintext, its ciphertext on the device, and what opens it."""
    plaintext, key = secrets.token_bytes(num_bytes), secrets.token_bytes(32)
    pieces = [plaintext[at : at + CHUNK] for at in range(0, num_bytes, CHUNK)]
    nonces = [secrets.token_bytes(12) for _ in pieces]
    aads = [secrets.token_bytes(7 * i % 40) for i in range(len(pieces))]
    sealed = [ChaCha20Poly1305(key).encrypt(n, p, a) for p, n, a in zip(pieces, nonces, aads, strict=True)]
    text = torch.frombuffer(bytearray(b"".join(s[:-16] for s in sealed)), dtype=torch.uint8).to(DEVICE)
    options = {"tags": [s[-16:] for s in sealed], "key": key, "nonces": nonces, "aads": aads, "chunk_bytes": CHUNK}
    return plaintext, text, options


@pytest.mark.parametrize("num_bytes", [CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 12_345])
def test_chunks_open(num_bytes):
    plaintext, text, options = seal(num_bytes)
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
    chacha20_poly1305.open_into(text, out=out, **options)
    assert bytes(out.cpu().numpy()) == plaintext


def test_one_flipped_bit_leaves_the_destination_as_it_was():
    plaintext, text, options = seal(3 * CHUNK)
    text[2 * CHUNK + 77] ^= 4
    out = torch.full((len(plaintext),), 0xA5, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(chacha20_poly1305.TagMismatchError) as caught:
        chacha20_poly1305.open_into(text, out=out, **options)
    assert caught.value.chunks == [2]
    assert bool((out == 0xA5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [7, 129, 49_152, 152_064])
def test_tokens_are_banned(num_tokens, dtype):
    logits = torch.randn(5, num_tokens, device=DEVICE).to(dtype)
    sets = torch.stack([pack_token_set(range(0, num_tokens, step), num_tokens) for step in (2, 3)]).to(DEVICE)
    rows = torch.tensor([0, NO_SET, 1, 1, 0], dtype=torch.int32, device=DEVICE)
    expected = logits.clone()
    token_mask_reference.ban_tokens(expected, sets, rows)
    token_mask.ban_tokens(logits, sets, rows)
    assert torch.equal(logits, expected)


def weight(kind: Format, rows: int, columns: int) -> FourBitWeight:
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), device=DEVICE).to(torch.int32)
    scales = torch.rand(rows, columns // 64, device=DEVICE) + 0.01
    return FourBitWeight(kind, words, scales if kind is Format.NF4 else scales.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(Format))
def test_four_bits_dequantize_bit_for_bit(kind, dtype):
    matrix = weight(kind, 33, 704)
    assert torch.equal(four_bit.dequantize(matrix, dtype), four_bit_reference.dequantize(matrix, dtype))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("kind", list(Format))
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_the_product_is_within_the_rounding_of_its_sums(num_tokens, kind, activation):
    matrix = weight(kind, 130, 1088)
    x, bias = torch.randn(num_tokens, 1088, device=DEVICE), torch.randn(130, device=DEVICE)
    expected = four_bit_reference.multiply(x, matrix, bias=bias, activation=activation)
    got = four_bit.multiply(x, matrix, bias=bias, activation=activation)
    # fp32 sums of a thousand terms, in another order than the reference's fp64.
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
