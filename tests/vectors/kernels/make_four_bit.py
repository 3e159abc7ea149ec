"""Write `four_bit.json`: matrices as two libraries store them in four bits, and digests of what they make of them.

Not part of `make vectors`, since bitsandbytes is a dependency of GPU hosts only:
    pip install --no-deps bitsandbytes==0.50.2 && python tests/vectors/kernels/make_four_bit.py
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from compressed_tensors.compressors.pack_quantized import helpers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def raw(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor, row by row."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def encode(tensor: torch.Tensor) -> str:
    """Bytes of a tensor in base64."""
    return base64.b64encode(raw(tensor)).decode()


def nf4_case(seed: int, shape: tuple[int, int], group: int) -> dict[str, Any]:
    """Quantize with bitsandbytes; the first values are zeros, tiny ones and large ones."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 2)
    matrix[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4, 1.0, -1.0])
    packed, state = functional.quantize_4bit(matrix, blocksize=group, quant_type="nf4")
    digests = {}
    for name, dtype in DTYPES.items():
        state.dtype = dtype
        digests[name] = hashlib.sha256(raw(functional.dequantize_4bit(packed, state))).hexdigest()
    stored = {"weights": encode(packed), "scales": encode(state.absmax), "scales_dtype": "fp32"}
    return {"format": "nf4", "shape": shape, "group": group, **stored, "sha256": digests}


def int4_case(seed: int, shape: tuple[int, int], group: int, name: str) -> dict[str, Any]:
    """Pack with compressed-tensors, and let it unpack and scale."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scales = (torch.rand(shape[0], shape[1] // group, generator=generator) + 0.01).to(DTYPES[name])
    packed = helpers.pack_to_int32(levels, 4)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=group)
    values = dequantize(helpers.unpack_from_int32(packed, 4, torch.Size(shape)), scales, args=args, dtype=DTYPES[name])
    stored = {"weights": encode(packed), "scales": encode(scales), "scales_dtype": name}
    return {
        "format": "int4",
        "shape": shape,
        "group": group,
        **stored,
        "sha256": {name: hashlib.sha256(raw(values)).hexdigest()},
    }


def main() -> None:
    """Write the file beside this script."""
    cases = [
        nf4_case(0, (1, 64), 64),
        nf4_case(1, (3, 128), 64),
        nf4_case(2, (17, 192), 64),
        nf4_case(3, (32, 512), 128),
        int4_case(4, (7, 64), 32, "bf16"),
        int4_case(5, (129, 128), 64, "fp16"),
        int4_case(6, (5, 1024), 128, "fp32"),
    ]
    Path(__file__).with_name("four_bit.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
