"""How a kernel is launched: compiled or interpreted, which block size, how many warps; pure functions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton import knobs

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INTERPRETED_LANES = 8192


def is_interpreted() -> bool:
    """Whether kernels are interpreted: where `TRITON_INTERPRET` says so, else where there is no CUDA device."""
    asked = os.environ.get("TRITON_INTERPRET")
    if asked is not None:
        return asked == "1"
    return not torch.cuda.is_available()


INTERPRETED = is_interpreted()


def jit(fn: Callable[..., Any]) -> Any:
    """Wrap a kernel body as `triton.jit` does, interpreted where this process has no device to compile for.

    The choice is made for this package alone, so that importing it never changes how another package's kernels run, nor
    how those of a child process do: Triton writes a setting into the environment, too, and its scope takes that back.
    """
    with knobs.runtime.scope():
        knobs.runtime.interpret = INTERPRETED
        return triton.jit(fn)


@jit
def load_u32(ptr) -> Any:
    """Load an int32 as the unsigned word it stands for."""
    return tl.load(ptr).to(tl.uint32, bitcast=True)


@jit
def block_sum(x, axis: tl.constexpr) -> Any:
    """`tl.sum`, in a form that an interpreted kernel may call although the rest of Triton is not interpreted."""
    return tl.reduce(x, axis, tl.standard._sum_combine)


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """Launch shape of one ChaCha20-Poly1305 open.

    Attributes:
        cipher_lanes: ChaCha20 blocks (64 bytes) a program, one a lane.
        mac_lanes: Poly1305 blocks (16 bytes) that one program takes side by side.
        mac_steps: How often a program does that; a power of two. `mac_lanes * mac_steps * 16` bytes are a segment.
        cipher_warps: Warps of a cipher program.
        mac_warps: Warps of a MAC program.
    """

    cipher_lanes: int
    mac_lanes: int
    mac_steps: int
    cipher_warps: int = 4
    mac_warps: int = 4


DEVICE_OPEN_PLAN = OpenPlan(cipher_lanes=128, mac_lanes=128, mac_steps=16)


def open_plan(chunk_bytes: int, *, interpreted: bool) -> OpenPlan:
    """Choose the launch shape for chunks of `chunk_bytes`.

    On a device 128 lanes a program: one lane a thread keeps both kernels free of spills on sm_80, sm_90 and sm_100
    (512 MAC lanes spill), and a 32 KiB MAC segment gives a 1 MiB chunk 32 programs. The interpreter pays by the
    operation and not by the lane, so there one program takes as much of a chunk as it can.
    """
    if not interpreted:
        return DEVICE_OPEN_PLAN
    cipher_lanes = min(MAX_INTERPRETED_LANES, max(16, triton.next_power_of_2(-(-chunk_bytes // 64))))
    mac_lanes = min(MAX_INTERPRETED_LANES, max(16, triton.next_power_of_2(-(-chunk_bytes // 16))))
    return OpenPlan(cipher_lanes=cipher_lanes, mac_lanes=mac_lanes, mac_steps=4)


def chunk_lanes(num_chunks: int) -> int:
    """How many chunks one program of a chunk-a-lane kernel takes: a warp's worth at most."""
    return int(min(32, triton.next_power_of_2(num_chunks)))


def mask_words(num_words: int, *, interpreted: bool) -> int:
    """How many words of a token set (32 tokens each) one program takes; 4,096 tokens on a device, 32 a thread."""
    return int(triton.next_power_of_2(num_words)) if interpreted else 128


@dataclass(frozen=True, slots=True)
class GemvPlan:
    """Launch shape of a four-bit matrix-vector product.

    Attributes:
        rows: Rows of the weight a program takes.
        words: Words (eight weights each) of every row that it takes at a time.
        warps: Warps of a program.
    """

    rows: int
    words: int
    warps: int = 1


# One warp a program: its lanes split a row's words, so the activations are loaded once for all rows, in registers.
DEVICE_GEMV_PLAN = GemvPlan(rows=8, words=32)
DEVICE_GATED_GEMV_PLAN = GemvPlan(rows=4, words=32)


def gemv_plan(num_rows: int, row_words: int, *, is_gated: bool, interpreted: bool) -> GemvPlan:
    """Choose the launch shape for `[num_rows, 8 * row_words]` weights; a gated one reads two rows for each."""
    if not interpreted:
        return DEVICE_GATED_GEMV_PLAN if is_gated else DEVICE_GEMV_PLAN
    rows = min(64, triton.next_power_of_2(num_rows))
    return GemvPlan(rows=int(rows), words=int(min(512, triton.next_power_of_2(row_words))))


def dequantize_words(num_words: int, *, interpreted: bool) -> int:
    """How many words one program dequantizes; four a thread on a device."""
    return int(min(4096, triton.next_power_of_2(num_words))) if interpreted else 512
