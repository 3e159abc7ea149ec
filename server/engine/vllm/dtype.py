"""The type a model is computed in where the settings leave it open and the processor is slow in the model's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

logger = logging.getLogger("strongroom.engine")


def with_fitting_dtype(args: list[str]) -> list[str]:
    """Return vLLM's arguments with `--dtype auto` made `float32` on a processor that can't multiply bfloat16.

    Without AVX-512 torch multiplies bfloat16 and float16 matrices without the processor's help, at a tenth of the
    speed of float32. Quantized models keep their type: their layers are not multiplied in it.

    Args:
        args: As `build_engine_argv` makes them; `--model` names a folder with its `config.json`.
    """
    where = args.index("--dtype") + 1 if "--dtype" in args else 0
    if not where or args[where] != "auto" or "--quantization" in args or multiplies_bfloat16():
        return args
    from vllm.platforms import current_platform  # only where it is asked for

    config = Path(args[args.index("--model") + 1], "config.json")
    if not current_platform.is_cpu() or "quantization_config" in json.loads(config.read_bytes()):
        return args
    logger.warning(
        "This processor has no AVX-512, so the model is computed in float32: a prompt is read some ten times faster "
        "than in 16 bits, weights and KV cache take twice the memory. engine.dtype: bfloat16 keeps them small."
    )
    return [*args[:where], "float32", *args[where + 1 :]]


def multiplies_bfloat16() -> bool:
    """Whether torch's matrix kernels for this processor take bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
