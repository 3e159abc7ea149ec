"""Bounds on a kernel's speed from its machine code and a device's data sheet: arithmetic, never a measurement."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving_kernels.launch import DEVICE_GEMV_PLAN, DEVICE_OPEN_PLAN

ROOT = Path(__file__).parents[2]
BITSANDBYTES_GEMV = "_Z14gemm_4bit_simtI13__nv_bfloat16Li1EEvPKT_PKhPKfS5_S7_S7_PS1_S3_iiiii"
BITSANDBYTES_LIBRARY = "libbitsandbytes_cuda130.so"
GROUP = 64


@dataclass(frozen=True, slots=True)
class Device:
    """A device as its data sheet has it. `link_gb_s` is one direction of its PCIe x16 slot, before protocol."""

    name: str
    target: str
    num_sms: int
    clock_ghz: float
    memory_gb_s: float
    link_gb_s: float


DEVICES = (
    Device("A100 SXM 80 GB", "sm_80", 108, 1.410, 2039.0, 31.5),
    Device("H100 SXM", "sm_90", 132, 1.755, 3350.0, 63.0),
    Device("B200", "sm_100", 148, 1.850, 8000.0, 63.0),
)

# Lanes that a multiprocessor takes in a clock. Assumed alike for all three targets; newer ones have more fp32 lanes, so
# there the figures are estimates that a device may exceed. A `.WIDE` product takes its pipe twice, a 16-byte access
# four times.
LANES = {"issue": 128, "alu": 64, "fma": 64, "lsu": 32}
_FMA = ("IMAD", "FFMA", "FADD", "FMUL", "HFMA2", "HMUL2", "HADD2")
_LSU = ("LDG", "STG", "LDS", "STS", "LDSM", "SHFL", "ATOM", "RED")
_ALU = ("LOP3", "SHF", "IADD3", "VIADD", "LEA", "ISETP", "FSETP", "SEL", "FSEL", "PRMT", "SGXT", "MOV", "BMSK", "IABS")

Static = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Bound:
    """How fast a kernel can be at most on one device of the assumed clock and lanes.

    Attributes:
        unit: What is counted: bytes of weights, weights, logits.
        instructions: Executed for each unit, by one lane.
        bytes_moved: To and from device memory for each unit.
        compute: 1e9 units a second if only instructions counted; None where there are no counts.
        memory: 1e9 units a second if only device memory counted.
        limit: Which of them is lower, and for instructions which pipe.
    """

    kernel: str
    device: str
    unit: str
    instructions: float | None
    bytes_moved: float
    compute: float | None
    memory: float
    limit: str

    @property
    def rate(self) -> float:
        """1e9 units a second."""
        return self.memory if self.compute is None else min(self.compute, self.memory)


def pipe_of(opcode: str) -> tuple[str | None, int]:
    """Return the pipe that an opcode takes besides an issue slot, and for how many turns."""
    base = opcode.split(".")[0]
    if base in _FMA:
        return "fma", 2 if "WIDE" in opcode else 1
    if base in _LSU:
        return "lsu", 4 if "128" in opcode else 2 if "64" in opcode else 1
    return ("alu", 1) if base in _ALU else (None, 1)


def bound(kernel: str, device: Device, mix: Counter[str], *, units: float, unit: str, bytes_moved: float) -> Bound:
    """Turn what one lane executes for `units` units into units a second.

    The busiest pipe decides; latencies, cache and bank conflicts, clocks below boost and launches are left out. At the
    assumed clock and lanes a kernel can only be slower; a device with more of either moves the figure with it.
    """
    turns: Counter[str] = Counter(issue=sum(mix.values()))
    for opcode, times in mix.items():
        pipe, cost = pipe_of(opcode)
        if pipe is not None:
            turns[pipe] += times * cost
    clocks = {pipe: count / LANES[pipe] / units for pipe, count in turns.items()}
    busiest = max(clocks, key=lambda pipe: clocks[pipe])
    compute, memory = device.num_sms * device.clock_ghz / clocks[busiest], device.memory_gb_s / bytes_moved
    limit = f"instructions ({busiest})" if compute < memory else "device memory"
    return Bound(kernel, device.name, unit, sum(mix.values()) / units, bytes_moved, compute, memory, limit)


def executed(counts: dict[str, Any], rounds: int) -> Counter[str]:
    """Return what one lane executes: the innermost loop `rounds` times, everything else once.

    Branches that are rarely taken count as if they always were.
    """
    loop: Counter[str] = Counter(counts["loops"][0] if counts["loops"] else {})
    total = Counter(counts["instructions"])
    for opcode, times in loop.items():
        total[opcode] += times * (rounds - 1)
    return total


def derive(static: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bounds of every kernel on every device whose machine code was counted, as plain values."""
    by_name: Static = {(counts["kernel"], counts["target"]): counts for counts in static}
    bounds: list[Bound] = []
    for device in DEVICES:
        if ("chacha20.decrypt", device.target) in by_name:
            bounds += open_bounds(by_name, device)
            bounds += four_bit_bounds(by_name, device)
            bounds += mask_bounds(by_name, device)
    return [asdict(b) | {"rate": b.rate} for b in bounds]


def open_bounds(static: Static, device: Device) -> list[Bound]:
    """Cipher and MAC, and one after the other: nothing is decrypted before every tag of the batch has verified."""
    unit, steps = "bytes of weights", DEVICE_OPEN_PLAN.mac_steps
    cipher_mix = executed(static["chacha20.decrypt", device.target], 10)
    mac_mix = executed(static["poly1305.segments", device.target], steps)
    cipher = bound("chacha20.decrypt", device, cipher_mix, units=64, unit=unit, bytes_moved=2)
    mac = bound("poly1305.segments", device, mac_mix, units=16 * steps, unit=unit, bytes_moved=1)
    both = Bound(
        "chacha20_poly1305.open",
        device.name,
        unit,
        (cipher.instructions or 0) + (mac.instructions or 0),
        cipher.bytes_moved + mac.bytes_moved,
        1 / (1 / cipher.rate + 1 / mac.rate),
        device.memory_gb_s / 3,
        f"{cipher.limit}, then {mac.limit}",
    )
    return [cipher, mac, both]


def four_bit_bounds(static: Static, device: Device) -> list[Bound]:
    """One token's product: the loop alone, as rows are long; beside it bitsandbytes' kernel where it is installed."""
    lane_weights = DEVICE_GEMV_PLAN.rows * DEVICE_GEMV_PLAN.words * 8 / 32
    bounds = []
    for kind, scale_bytes in (("nf4", 4), ("int4", 2)):
        stored = 0.5 + scale_bytes / GROUP
        loop = Counter(static[f"four_bit.multiply.{kind}", device.target]["loops"][0])
        name = f"four_bit.multiply.{kind}"
        bounds.append(bound(name, device, loop, units=lane_weights, unit="weights", bytes_moved=stored))
        whole = executed(static[f"four_bit.dequantize.{kind}", device.target], 1)
        name = f"four_bit.dequantize.{kind}"
        bounds.append(bound(name, device, whole, units=32, unit="weights", bytes_moved=stored + 2))
    library = static.get(("bitsandbytes.gemm_4bit_simt", device.target))
    if library is not None:
        loop = Counter(library["loops"][0])
        name = "bitsandbytes.gemm_4bit_simt"
        bounds.append(bound(name, device, loop, units=32, unit="weights", bytes_moved=0.5 + 4 / GROUP))
    return bounds


def mask_bounds(static: Static, device: Device) -> list[Bound]:
    """The mask reads a bit a logit; a boolean mask and `masked_fill_` read nine bytes a logit with the writing."""
    mix = executed(static["token_mask.fp32", device.target], 1)
    ours = bound("token_mask", device, mix, units=32, unit="logits", bytes_moved=1 / 8)
    fill = Bound("masked_fill_", device.name, "logits", None, 9, None, device.memory_gb_s / 9, "device memory")
    return [ours, fill]


def static_counts() -> list[dict[str, Any]]:
    """Compile every kernel for every target in a process that compiles, and count; add the library's own kernel."""
    done = subprocess.run(
        [sys.executable, "-m", "serving_kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    counts: list[dict[str, Any]] = json.loads(done.stdout)
    return counts + library_counts()


def library_counts() -> list[dict[str, Any]]:
    """Count bitsandbytes' own kernel for one token in the library that it ships; empty where it is not installed."""
    from serving_kernels import aot

    spec = importlib.util.find_spec("bitsandbytes")
    path = Path(spec.origin).parent / BITSANDBYTES_LIBRARY if spec is not None and spec.origin else None
    if path is None or not path.exists():
        return []
    found = []
    for target in aot.TARGETS:
        code = aot.disassemble(path, target=target, function=BITSANDBYTES_GEMV)
        # The loop over a row: one load of 32 weights and four of their activations, a shuffle a weight for the table.
        # For sm_80 it is scattered over calls and cannot be told from the rest; nothing is said of it then.
        loops = [loop for loop in aot.find_loops(code) if loop.get("SHFL") == 32 and "CALL" not in loop]
        if loops:
            names = {"kernel": "bitsandbytes.gemm_4bit_simt", "target": f"sm_{target}"}
            found.append({**names, "instructions": aot.count(code), "loops": loops[:1]})
    return found
