"""Compile every kernel ahead of time for each supported device and count what the machine code holds; needs no GPU."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from serving_kernels import chacha20, four_bit, poly1305, token_mask
from serving_kernels.launch import (
    DEVICE_GATED_GEMV_PLAN,
    DEVICE_GEMV_PLAN,
    DEVICE_OPEN_PLAN,
    INTERPRETED,
    dequantize_words,
    mask_words,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

TARGETS = (80, 90, 100)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.A-Z0-9_a-z]*)([^;]*);")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel as it is launched on a device.

    Attributes:
        name: Its name in tables.
        fn: The jit function.
        signature: Triton type of every run-time parameter, in order.
        constants: Value of every constexpr parameter.
        num_warps: Warps of a program.
        divisible: Integer parameters that 16 divides in the common launch; pointers count as such.
        max_registers: Most registers a thread may use on any target; a test holds the kernel to it.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    max_registers: int
    divisible: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StaticCounts:
    """What the machine code of one kernel for one target holds.

    Attributes:
        registers: Registers a thread.
        stack_bytes: Stack a thread; spills would be here.
        local_bytes: Local memory a thread.
        shared_bytes: Shared memory a program, as Triton asks for it.
        spill_instructions: Loads and stores of local memory.
        instructions: How often each opcode stands in the whole kernel.
        loops: The same for each loop body, innermost first.
    """

    kernel: str
    target: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    spill_instructions: int
    instructions: dict[str, int]
    loops: list[dict[str, int]] = field(default_factory=list)


def kernel_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel with the launch shape that a device gets."""
    plan = DEVICE_OPEN_PLAN
    log_lanes, log_steps = plan.mac_lanes.bit_length() - 1, plan.mac_steps.bit_length() - 1
    return (
        KernelSpec(
            "chacha20.one_time_keys",
            chacha20.one_time_keys,
            {"key_ptr": "*i32", "nonce_ptr": "*i32", "one_time_ptr": "*i32", "num_chunks": "i32"},
            {"LANES": 32},
            num_warps=1,
            max_registers=64,
        ),
        KernelSpec(
            "poly1305.powers",
            poly1305.powers,
            {"one_time_ptr": "*i32", "power_ptr": "*i32"},
            {"LANES": plan.mac_lanes, "LOG_LANES": log_lanes},
            num_warps=plan.mac_warps,
            max_registers=64,
        ),
        KernelSpec(
            "poly1305.segments",
            poly1305.sum_segments,
            {
                **dict.fromkeys(("text_ptr", "aad_ptr", "aad_bytes_ptr", "power_ptr", "part_ptr"), "*i32"),
                **dict.fromkeys(("stride_quads", "aad_row_blocks", "chunk_bytes", "last_bytes"), "i32"),
            },
            {"LANES": plan.mac_lanes, "STEPS": plan.mac_steps},
            num_warps=plan.mac_warps,
            max_registers=64,
            divisible=frozenset({"chunk_bytes"}),
        ),
        KernelSpec(
            "poly1305.verify",
            poly1305.verify_tags,
            {
                "text_ptr": "*u8",
                **dict.fromkeys(
                    ("aad_bytes_ptr", "one_time_ptr", "power_ptr", "part_ptr", "tag_ptr", "good_ptr"), "*i32"
                ),
                **dict.fromkeys(("stride_bytes", "chunk_bytes", "last_bytes", "num_chunks", "num_segments"), "i32"),
            },
            {"MAC_LANES": plan.mac_lanes, "LOG_STEPS": log_steps, "LANES": 32},
            num_warps=1,
            max_registers=128,
            divisible=frozenset({"stride_bytes", "chunk_bytes"}),
        ),
        KernelSpec(
            "chacha20.decrypt",
            chacha20.decrypt,
            {
                **dict.fromkeys(("text_ptr", "key_ptr", "nonce_ptr", "out_ptr"), "*i32"),
                **dict.fromkeys(("stride_quads", "chunk_blocks", "num_blocks"), "i32"),
            },
            {"LANES": plan.cipher_lanes},
            num_warps=plan.cipher_warps,
            max_registers=64,
            divisible=frozenset({"chunk_blocks", "num_blocks"}),
        ),
        KernelSpec(
            "chacha20.decrypt_tail",
            chacha20.decrypt_tail,
            {"text_ptr": "*u8", "key_ptr": "*i32", "nonce_ptr": "*i32", "out_ptr": "*u8", "num_bytes": "i32"},
            {},
            num_warps=1,
            max_registers=128,
        ),
        *(
            KernelSpec(
                f"token_mask.{name}",
                token_mask.mask_logits,
                {
                    "logits_ptr": f"*{name}",
                    "set_ptr": "*i32",
                    "row_ptr": "*i32",
                    **dict.fromkeys(("row_stride", "num_sets", "num_words", "num_tokens"), "i32"),
                },
                {"WORDS": mask_words(1 << 12, interpreted=False)},
                num_warps=4,
                max_registers=64,
                divisible=frozenset({"row_stride", "num_words", "num_tokens"}),
            )
            for name in ("fp32", "bf16")
        ),
        *(
            KernelSpec(
                f"four_bit.dequantize.{kind}",
                four_bit.dequantize_words,
                {
                    "word_ptr": "*i32",
                    "scale_ptr": scale,
                    "table_ptr": "*fp32",
                    "out_ptr": "*bf16",
                    **dict.fromkeys(("num_words", "group_words"), "i32"),
                },
                {"WORDS": dequantize_words(1 << 20, interpreted=False), "NF4": kind == "nf4"},
                num_warps=4,
                max_registers=64,
                divisible=frozenset({"num_words"}),
            )
            for kind, scale in (("nf4", "*fp32"), ("int4", "*bf16"))
        ),
        *(
            KernelSpec(
                f"four_bit.multiply.{kind}{'.gated' if activation else ''}",
                four_bit.multiply_vector,
                {
                    "x_ptr": "*bf16",
                    "word_ptr": "*i32",
                    "scale_ptr": scale,
                    "table_ptr": "*fp32",
                    "bias_ptr": "*bf16",
                    "out_ptr": "*bf16",
                    **dict.fromkeys(("num_rows", "row_words", "group_words"), "i32"),
                },
                {
                    "ROWS": gemv.rows,
                    "WORDS": gemv.words,
                    "NF4": kind == "nf4",
                    "BIAS": True,
                    "ACTIVATION": activation,
                },
                num_warps=gemv.warps,
                max_registers=128,
                divisible=frozenset({"num_rows", "row_words"}),
            )
            for kind, scale in (("nf4", "*fp32"), ("int4", "*bf16"))
            for activation, gemv in ((0, DEVICE_GEMV_PLAN), (3, DEVICE_GATED_GEMV_PLAN))
        ),
    )


def variant_specs() -> tuple[KernelSpec, ...]:
    """Return what else a device launches: batches of few chunks, sizes that 16 does not divide, fp16 logits."""
    specs = {spec.name: spec for spec in kernel_specs()}
    few = [
        replace(specs[name], name=f"{name}.lanes_{lanes}", constants={**specs[name].constants, "LANES": lanes})
        for name in ("chacha20.one_time_keys", "poly1305.verify")
        for lanes in (1, 2, 4, 8, 16)
    ]
    odd = [
        replace(specs[name], name=f"{name}.odd", divisible=frozenset())
        for name in ("poly1305.segments", "poly1305.verify", "chacha20.decrypt", "token_mask.bf16")
    ]
    mask = specs["token_mask.bf16"]
    half = replace(mask, name="token_mask.fp16", signature={**mask.signature, "logits_ptr": "*fp16"})
    return (*few, *odd, half)


def compile_kernel(spec: KernelSpec, target: int) -> StaticCounts:
    """Compile `spec` for `sm_<target>` and count its machine code.

    Raises:
        RuntimeError: If this process interprets its kernels (`TRITON_INTERPRET=0` makes it compile), or a tool fails.
    """
    if INTERPRETED:
        raise RuntimeError("This process interprets its kernels; set TRITON_INTERPRET=0 to compile them.")
    signature = {**spec.signature, **dict.fromkeys(spec.constants, "constexpr")}
    names = list(signature)
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in spec.divisible
    }
    constants = {(names.index(name),): value for name, value in spec.constants.items()}
    source = ASTSource(spec.fn, signature, constants, attributes)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": spec.num_warps, "enable_fp_fusion": True}
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run_tool("cuobjdump", "-res-usage", str(cubin))
        code = disassemble(cubin)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return StaticCounts(
        kernel=spec.name,
        target=f"sm_{target}",
        registers=int(found["REG"]),
        stack_bytes=int(found["STACK"]),
        local_bytes=int(found["LOCAL"]),
        shared_bytes=int(kernel.metadata.shared),
        spill_instructions=sum(opcode in ("LDL", "STL") for _, opcode, _, _ in code),
        instructions=count(code),
        loops=find_loops(code),
    )


Code = list[tuple[int, str, str, str]]


def disassemble(path: Path, *, target: int | None = None, function: str | None = None) -> Code:
    """Return address, opcode, modifiers and operands of every instruction.

    Args:
        path: A cubin, or a library with device code in it.
        target: Which of a library's targets.
        function: Mangled name of one function of it.

    Raises:
        RuntimeError: The disassembler fails.
    """
    choice = ["-arch", f"sm_{target}"] if target else []
    choice += ["-fun", function] if function else []
    sass = _run_tool("cuobjdump", *choice, "-sass", str(path))
    return [(int(at, 16), opcode, rest, args) for at, opcode, rest, args in _INSTRUCTION.findall(sass)]


def count(code: Iterable[tuple[int, str, str, str]]) -> dict[str, int]:
    """Opcodes by frequency; of the modifiers only those that choose the pipe (`IMAD.WIDE`) are kept."""
    names = (
        opcode + "".join(f".{part}" for part in rest.split(".") if part in ("WIDE", "MOV", "IADD", "SHL", "64", "128"))
        for _, opcode, rest, _ in code
        if opcode not in ("NOP",)
    )
    return dict(Counter(names).most_common())


def find_loops(code: Code) -> list[dict[str, int]]:
    """Bodies of backward branches, shortest first; the branch to itself that ends every kernel is none."""
    found = []
    for at, opcode, _, args in code:
        target = re.search(r"0x([0-9a-f]+)", args)
        if opcode == "BRA" and target is not None and int(target[1], 16) < at:
            found.append([line for line in code if int(target[1], 16) <= line[0] <= at])
    return [count(body) for body in sorted(found, key=len)]


def _run_tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def compile_all(
    targets: tuple[int, ...] = TARGETS, prefix: str = "", *, variants: bool = False
) -> tuple[StaticCounts, ...]:
    """Compile every kernel for every target; about a second each, less where Triton's own cache has it."""
    known = variant_specs() if variants else kernel_specs()
    specs = [spec for spec in known if spec.name.startswith(prefix)]
    return tuple(compile_kernel(spec, target) for spec in specs for target in targets)


def main(argv: list[str] | None = None) -> int:
    """Print the static counts as JSON; `python -m serving_kernels.aot` is what tests and benchmarks call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="", help="only kernels whose name begins so")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="compute capabilities, as 90")
    parser.add_argument("--variants", action="store_true", help="the other shapes that a device launches, instead")
    arguments = parser.parse_args(argv)
    compiled = compile_all(tuple(arguments.targets), arguments.kernel, variants=arguments.variants)
    json.dump([asdict(counts) for counts in compiled], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
