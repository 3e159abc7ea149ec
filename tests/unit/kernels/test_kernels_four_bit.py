"""Four-bit kernels: bit for bit what the formats' own libraries dequantize, and a product within stated tolerances."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serving_kernels import four_bit, launch
from serving_kernels.four_bit_weight import Activation, Format, FourBitWeight, from_bitsandbytes
from serving_kernels.launch import GemvPlan
from serving_kernels.reference import four_bit as reference

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "kernels" / "four_bit.json").read_text())
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sums are kept in fp32 in another order than the reference's fp64: the error is a few ulps of the result's own type,
# relative to the largest partial sum. fp32 shows the sum's own rounding, 2^-24 times a few hundred terms.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-17}


def decode(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)


def from_vector(case: dict[str, Any]) -> FourBitWeight:
    scales = decode(case["scales"], DTYPES[case["scales_dtype"]])
    rows, columns = case["shape"]
    if case["format"] == "nf4":
        return from_bitsandbytes(decode(case["weights"], torch.uint8), scales, (rows, columns))
    words = decode(case["weights"], torch.int32)
    return FourBitWeight(Format.INT4, words.view(rows, columns // 8), scales.view(rows, -1))


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("case", VECTORS, ids=[f"{case['format']}-{case['shape']}" for case in VECTORS])
def test_both_formats_dequantize_to_the_bytes_of_their_own_library(case):
    weight = from_vector(case)
    assert weight.group_size == case["group"]
    for name, digest in case["sha256"].items():
        assert sha256(four_bit.dequantize(weight, DTYPES[name])) == digest
        assert sha256(reference.dequantize(weight, DTYPES[name])) == digest


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("kind", list(Format))
def test_every_nibble_in_every_place_dequantizes_as_the_reference_does(kind, dtype):
    nibbles = (torch.arange(16)[:, None] + torch.arange(8)) % 16
    words = (nibbles << (4 * torch.arange(8))).sum(dim=1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)[:, None]
    weight = FourBitWeight(kind, words, torch.linspace(0.1, 3.7, 16)[:, None])
    assert torch.equal(four_bit.dequantize(weight, dtype), reference.dequantize(weight, dtype))


def int4_weight(rows: int, columns: int) -> FourBitWeight:
    scales = torch.rand(rows, columns // 64, generator=torch.Generator().manual_seed(3)) + 0.01
    return FourBitWeight(Format.INT4, nf4_weight(rows, columns).words, scales.to(torch.bfloat16))


def nf4_weight(rows: int, columns: int, block: int = 64) -> FourBitWeight:
    generator = torch.Generator().manual_seed(rows + columns)
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator).to(torch.int32)
    return FourBitWeight(Format.NF4, words, torch.rand(rows, columns // block, generator=generator) + 0.01)


def assert_close(got: torch.Tensor, expected: torch.Tensor, scale: float) -> None:
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= TOLERANCE[got.dtype] * scale


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("kind", list(Format))
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (7, 128), (127, 192), (128, 256), (129, 64), (33, 4096)])
def test_the_product_of_one_token(rows, columns, kind, dtype):
    weight = (nf4_weight if kind is Format.NF4 else int4_weight)(rows, columns)
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference.multiply(x, weight)
    largest = (x.double().abs() @ reference.dequantize(weight, torch.float32).double().abs().T).max().item()
    assert_close(four_bit.multiply(x, weight), expected, largest)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_bias_and_activation_are_fused(num_tokens, activation, with_bias):
    weight = nf4_weight(66, 128)
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 128, generator=generator)
    bias = torch.randn(66, generator=generator) if with_bias else None
    expected = reference.multiply(x, weight, bias=bias, activation=activation)
    got = four_bit.multiply(x, weight, bias=bias, activation=activation)
    assert got.shape == (num_tokens, 33 if activation is Activation.SILU_AND_MUL else 66)
    assert_close(got, expected, expected.abs().max().item() * 16)


@pytest.mark.parametrize("plan", [launch.DEVICE_GEMV_PLAN, launch.DEVICE_GATED_GEMV_PLAN, GemvPlan(rows=1, words=8)])
def test_any_launch_shape_gives_the_same(plan):
    weight = nf4_weight(9, 320)
    x = torch.randn(2, 320, generator=torch.Generator().manual_seed(0))
    expected = reference.multiply(x, weight)
    assert_close(four_bit.multiply(x, weight, plan=plan), expected, expected.abs().max().item() * 16)


def test_large_values_do_not_overflow_the_activations():
    weight = nf4_weight(8, 64)
    x = torch.full((1, 64), 1e3)
    for activation in Activation:
        assert four_bit.multiply(x, weight, activation=activation).isfinite().all()
        assert four_bit.multiply(-x, weight, activation=activation).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": torch.zeros(4, 16, dtype=torch.int64)}, "words is"),
        ({"words": torch.zeros(16, 4, dtype=torch.int32).t()}, "contiguous"),
        ({"words": torch.zeros(0, 16, dtype=torch.int32), "scales": torch.zeros(0, 2)}, "words is"),
        ({"scales": torch.zeros(3, 2)}, "scales is"),
        ({"scales": torch.zeros(4, 2, dtype=torch.bfloat16)}, "NF4 takes fp32"),
        ({"scales": torch.zeros(4, 3)}, "multiple of 8"),
        ({"scales": torch.zeros(4, 32)}, "multiple of 8"),
        ({"scales": torch.zeros(4, 2, device="meta")}, "meta"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(change, message):
    fitting = FourBitWeight(Format.NF4, torch.zeros(4, 16, dtype=torch.int32), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=message):
        replace(fitting, **change)


@pytest.mark.parametrize(
    ("packed", "absmax", "shape"),
    [
        (torch.zeros(64, dtype=torch.int8), torch.ones(2), (2, 64)),
        (torch.zeros(63, dtype=torch.uint8), torch.ones(2), (2, 64)),
        (torch.zeros(6, dtype=torch.uint8), torch.ones(1), (1, 12)),
        (torch.zeros(96, dtype=torch.uint8), torch.ones(3), (2, 96)),
        (torch.zeros(65, dtype=torch.uint8)[1:], torch.ones(2), (2, 64)),
        (torch.zeros(128, dtype=torch.uint8)[::2], torch.ones(2), (2, 64)),
        (torch.zeros(64, dtype=torch.uint8), torch.ones(4)[::2], (2, 64)),
        (torch.zeros(0, dtype=torch.uint8), torch.ones(0), (0, 64)),
    ],
)
def test_a_matrix_whose_blocks_cross_rows_is_refused(packed, absmax, shape):
    with pytest.raises(ValueError, match=r"rows"):
        from_bitsandbytes(packed, absmax, shape)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(1, 128, dtype=torch.float64), {}, "x is"),
        (torch.zeros(1, 64), {}, r"\[M, 128\]"),
        (torch.zeros(128, 2).t(), {}, "contiguous"),
        (torch.zeros(9, 128), {}, "1 to 8"),
        (torch.zeros(0, 128), {}, "1 to 8"),
        (torch.zeros(1, 128), {"activation": Activation.SILU_AND_MUL}, "as many gate"),
        (torch.zeros(1, 128), {"bias": torch.zeros(4)}, "bias is"),
        (torch.zeros(1, 128), {"bias": torch.zeros(10)[::2]}, "bias is"),
        (torch.zeros(1, 128, device="meta"), {}, "must all be on"),
    ],
)
def test_a_product_that_does_not_fit_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        four_bit.multiply(x, nf4_weight(5, 128), **options)


def test_more_rows_than_a_grid_holds_are_refused():
    with pytest.raises(ValueError, match="at most 65535 fit a launch"):
        four_bit.multiply(torch.zeros(1, 64), nf4_weight(65_536, 64), plan=GemvPlan(rows=1, words=8))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="bf16, fp16 and fp32"):
        four_bit.dequantize(nf4_weight(1, 64), torch.float64)


def test_a_weight_on_another_kind_of_device_is_refused():
    weight = nf4_weight(1, 64)
    elsewhere = replace(weight, words=weight.words.to("meta"), scales=weight.scales.to("meta"))
    with pytest.raises(ValueError, match="runs its kernels on"):
        four_bit.dequantize(elsewhere, torch.float32)
