"""What is timed on a GPU: each kernel at a size that serving meets, beside the best library calls for the same work."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from serving_kernels import chacha20_poly1305, four_bit, token_mask
from serving_kernels.four_bit_weight import Activation, Format, FourBitWeight
from serving_kernels.reference import chacha20_poly1305 as open_reference
from serving_kernels.token_set import pack_token_set

Run = Callable[[], Any]
GROUP = 64


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        name: As in the table of bounds.
        shape: What it was run on, in words.
        dtype: Of the values in and out.
        num_bytes: What the kernel must move to and from device memory.
        run: The kernel.
        baselines: Library calls by name, each with what it must move.
    """

    name: str
    shape: str
    dtype: str
    num_bytes: int
    run: Run
    baselines: dict[str, tuple[Run, int]] = field(default_factory=dict)


def open_case(device: torch.device, *, num_chunks: int, chunk_bytes: int) -> Case:
    """Open chunks that really are authentic; beside it a device-to-device copy, which is the floor."""
    size = num_chunks * chunk_bytes
    text = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    key, nonces = secrets.token_bytes(32), [secrets.token_bytes(12) for _ in range(num_chunks)]
    aads = [secrets.token_bytes(105)] * num_chunks
    pieces = zip(text.cpu().split(chunk_bytes), nonces, aads, strict=True)
    tags = [open_reference.compute_tag(piece, key=key, nonce=nonce, aad=aad) for piece, nonce, aad in pieces]
    out = torch.empty_like(text)
    chunk = chunk_bytes if num_chunks > 1 else None

    def run() -> None:
        chacha20_poly1305.open_into(text, tags, key=key, nonces=nonces, aads=aads, out=out, chunk_bytes=chunk)

    baselines: dict[str, tuple[Run, int]] = {"copy on the device": (lambda: out.copy_(text), 2 * size)}
    shape = f"{num_chunks} chunks of {chunk_bytes} bytes"
    return Case("chacha20_poly1305.open", shape, "uint8", 3 * size, run, baselines)


def mask_case(device: torch.device, *, batch: int, num_tokens: int, num_banned: int) -> Case:
    """Ban the same tokens in every row, by set, by boolean mask and by index."""
    logits = torch.zeros(batch, num_tokens, device=device)
    banned = torch.arange(num_banned) * (num_tokens // num_banned)
    sets = pack_token_set(banned.tolist(), num_tokens)[None].to(device)
    rows = torch.zeros(batch, dtype=torch.int32, device=device)
    index = banned.to(device)
    mask = torch.zeros(batch, num_tokens, dtype=torch.bool, device=device).index_fill_(1, index, value=True)
    written = batch * num_banned * 32
    baselines: dict[str, tuple[Run, int]] = {
        "masked_fill_": (lambda: logits.masked_fill_(mask, float("-inf")), 9 * batch * num_tokens),
        "index_fill_": (lambda: logits.index_fill_(1, index, float("-inf")), written),
    }
    shape = f"{batch} rows of {num_tokens} logits, {num_banned} banned"
    num_bytes = batch * num_tokens // 8 + written
    return Case("token_mask", shape, "fp32", num_bytes, lambda: token_mask.ban_tokens(logits, sets, rows), baselines)


def product_case(device: torch.device, *, kind: Format, rows: int, columns: int, activation: Activation) -> Case:
    """Multiply one token's vector; beside it bitsandbytes (NF4), Marlin (int4) and a bf16 product of the same shape.

    The baselines add the bias but leave the activation to a second call, which is not timed.
    """
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), device=device).to(torch.int32)
    scales = torch.rand(rows, columns // GROUP, device=device) * 0.01
    weight = FourBitWeight(kind, words, scales if kind is Format.NF4 else scales.to(torch.bfloat16))
    x = torch.randn(1, columns, device=device).to(torch.bfloat16)
    bias = torch.randn(rows, device=device).to(torch.bfloat16)
    dense = four_bit.dequantize(weight, torch.bfloat16)
    num_bytes = rows * columns // 2 + weight.scales.numel() * weight.scales.element_size()
    baselines: dict[str, tuple[Run, int]] = {
        "bf16 linear": (lambda: torch.nn.functional.linear(x, dense, bias), 2 * rows * columns)
    }
    if device.type == "cuda" and kind is Format.NF4 and importlib.util.find_spec("bitsandbytes"):
        baselines["bitsandbytes"] = (_bitsandbytes(x, dense, bias), num_bytes)
    if device.type == "cuda" and kind is Format.INT4 and importlib.util.find_spec("vllm"):
        baselines["Marlin through vLLM"] = (_marlin(x, dense, bias), num_bytes)
    name = f"four_bit.multiply.{kind}" + (".gated" if activation is Activation.SILU_AND_MUL else "")

    def run() -> torch.Tensor:
        return four_bit.multiply(x, weight, bias=bias, activation=activation)

    return Case(name, f"[{rows}, {columns}], groups of {GROUP}", "bf16", num_bytes, run, baselines)


def _bitsandbytes(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> Run:
    from bitsandbytes import functional, matmul_4bit

    packed, state = functional.quantize_4bit(dense, blocksize=GROUP, quant_type="nf4")
    return lambda: matmul_4bit(x, packed.t(), state, bias=bias)


def _marlin(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> Run:
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    rows, columns = dense.shape
    _, words, scales = marlin_quantize(dense.t().contiguous(), scalar_types.uint4b8, GROUP)
    workspace = marlin_utils.marlin_make_workspace_new(dense.device)
    none = torch.empty(0, dtype=torch.int32, device=dense.device)
    bias = marlin_utils.marlin_permute_bias(bias)
    return lambda: marlin_utils.apply_gptq_marlin_linear(
        x, words, scales, none, workspace, scalar_types.uint4b8, rows, columns, bias=bias
    )


def serving_cases(device: torch.device) -> Iterator[Case]:
    """Yield sizes of a 7-billion-parameter coder: hidden 3,584, intermediate 18,944, vocabulary 152,064."""
    yield open_case(device, num_chunks=64, chunk_bytes=1 << 20)
    yield open_case(device, num_chunks=8, chunk_bytes=1 << 20)
    yield mask_case(device, batch=64, num_tokens=152_064, num_banned=22)
    yield mask_case(device, batch=64, num_tokens=152_064, num_banned=20_000)
    for kind in Format:
        yield product_case(device, kind=kind, rows=4608, columns=3584, activation=Activation.NONE)
        yield product_case(device, kind=kind, rows=37_888, columns=3584, activation=Activation.SILU_AND_MUL)


def small_cases(device: torch.device) -> Iterator[Case]:
    """Yield the same calls on sizes that the interpreter manages, so that a test runs them all without a GPU."""
    yield open_case(device, num_chunks=2, chunk_bytes=128)
    yield mask_case(device, batch=2, num_tokens=320, num_banned=10)
    for kind in Format:
        yield product_case(device, kind=kind, rows=32, columns=128, activation=Activation.NONE)
        yield product_case(device, kind=kind, rows=32, columns=128, activation=Activation.SILU_AND_MUL)
