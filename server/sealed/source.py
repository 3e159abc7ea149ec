"""Where a model to be sealed comes from: a folder of safetensors, or tensors already in memory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server.errors import ConfigError
from server.sealed.format import (
    DTYPE_BYTES,
    MAX_FILE_BYTES,
    RECIPIENTS_NAME,
    SIGNATURE_NAME,
    Index,
    IndexEntry,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from server.sealed.shard import TensorSource

CONFIG_NAME: Final = "config.json"
_MAX_HEADER_BYTES: Final = 100_000_000
_PLAIN_SUFFIXES: Final = frozenset({".json", ".txt", ".jinja", ".model", ".tiktoken", ".md", ""})
_PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"})
_CODE_SUFFIXES: Final = frozenset({".py", ".pyc", ".so", ".dll", ".sh", ".js", ".ipynb"})
# It lists tensor names, which are secret, and vLLM does not need it.
_DROPPED_NAMES: Final = frozenset({"model.safetensors.index.json"})
_FLOAT_DTYPES: Final = frozenset({"F16", "BF16", "F32"})
_TORCH_NAMES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Source:
    """A model in the clear: shards of tensors, and its config and tokenizer files by name."""

    shards: Sequence[TensorSource]
    files: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors in all."""
        return sum(e.num_bytes for s in self.shards for e in s.index.entries)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in memory; `dtype` is safetensors' name, `data` its bytes, C-contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class MemoryShard:
    """Tensors in memory, as one shard."""

    def __init__(self, tensors: Sequence[Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
        self._data = [t.data.cast("B") for t in tensors]
        self.index = Index(
            tuple(IndexEntry(t.name, t.dtype, t.shape, len(d)) for t, d in zip(tensors, self._data, strict=True)),
            dict(metadata or {"format": "pt"}),
        )

    def read_into(self, position: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a tensor."""
        buffer[:] = self._data[position][offset : offset + len(buffer)]


class SafetensorsShard:
    """A safetensors file, parsed here: no library maps it, so no more than a chunk is in memory.

    Raises:
        ConfigError: The file is malformed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._starts, self.index = self._parse()
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as err:
            self.close()
            raise ConfigError(f"{path.name} is not a well-formed safetensors file: {err}. Fetch it again.") from err

    def _parse(self) -> tuple[list[int], Index]:
        size = os.fstat(self._fd).st_size
        header_bytes = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("header size")
        header = json.loads(os.pread(self._fd, header_bytes, 8))
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        entries: list[IndexEntry] = []
        starts, expected = [], 0
        for name, info in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            begin, end = info["data_offsets"]
            entry = IndexEntry(name, info["dtype"], tuple(info["shape"]), end - begin)
            if begin != expected or entry.num_bytes != _num_bytes(entry):
                raise ValueError(f"offsets of tensor {len(entries)}")
            starts.append(8 + header_bytes + begin)
            entries.append(entry)
            expected = end
        if 8 + header_bytes + expected != size:
            raise ValueError("size")
        return starts, Index(tuple(entries), metadata)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def read_into(self, position: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a tensor."""
        at = self._starts[position] + offset
        while buffer:
            count = os.preadv(self._fd, [buffer], at)
            if count == 0:
                raise ConfigError(f"{self._path.name} shrank while it was read. Start again.")
            buffer, at = buffer[count:], at + count


def load_source(folder: Path) -> Source:
    """Read a model folder in Hugging Face's layout.

    Raises:
        ConfigError: Pickle files, code or anything unknown in the folder, named; or no weights, or a malformed file.
    """
    shards: list[SafetensorsShard] = []
    files: dict[str, bytes] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError as err:
        raise ConfigError(f"The model folder {folder} cannot be read: {err.strerror}.") from err
    for path in entries:
        if path.name.startswith(".") or path.name in _DROPPED_NAMES:
            continue
        if path.is_dir():
            raise ConfigError(f"{path.name} is a folder; a model folder to be sealed is flat. Move it away.")
        if path.suffix == ".safetensors":
            shards.append(SafetensorsShard(path))
        else:
            files[path.name] = _read_plain(path)
    if not shards:
        raise ConfigError(f"The model folder {folder} holds no .safetensors file. Convert the weights first.")
    return prepare(shards, files)


def prepare(shards: Sequence[TensorSource], files: Mapping[str, bytes]) -> Source:
    """Check plain files, and write into the config what an engine would otherwise read from safetensors headers.

    Raises:
        ConfigError: Pickle, code or something unknown among the files; a name that appears twice; a bad config.
    """
    for name in files:
        refuse_by_name(name)
    names = [e.name for s in shards for e in s.index.entries]
    if len(set(names)) != len(names):
        raise ConfigError("A tensor name appears twice in the model. Fetch the weights again.")
    completed = dict(files)
    for name, content in files.items():
        if name.endswith(".json"):
            _refuse_remote_code(name, content)
    if CONFIG_NAME in files:
        completed[CONFIG_NAME] = _complete_config(_parse_object(CONFIG_NAME, files[CONFIG_NAME]), shards)
    return Source(shards, completed)


def refuse_by_name(name: str) -> None:
    """Raise unless a plain file of this name may be part of a sealed model.

    Raises:
        ConfigError: With the reason.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        raise ConfigError(f"{name} is a pickle file: it runs code when it is loaded. Remove it; use safetensors.")
    if suffix in _CODE_SUFFIXES:
        raise ConfigError(f"{name} is code; models that bring their own code are not served. Remove it.")
    if suffix not in _PLAIN_SUFFIXES or name in (RECIPIENTS_NAME, SIGNATURE_NAME):
        raise ConfigError(f"{name} is of a kind that is not known to be config or tokenizer. Remove it.")


def describe(source: Source) -> tuple[str, str]:
    """Return dtype and quantization for `core.json`, from the config and the tensors."""
    config = json.loads(source.files.get(CONFIG_NAME, b"{}"))
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or _common_dtype(source.shards)
    return str(dtype), str(quantization.get("quant_method", "none"))


def _num_bytes(entry: IndexEntry) -> int:
    num_elements = 1
    for size in entry.shape:
        num_elements *= size
    return num_elements * DTYPE_BYTES[entry.dtype]


def _read_plain(path: Path) -> bytes:
    refuse_by_name(path.name)
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path.name} is over {MAX_FILE_BYTES} bytes, too big for config or tokenizer. Remove it.")
    # A zip (PyTorch's container) or a pickle under another name.
    if content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ConfigError(f"{path.name} is a pickle or zip file under another name. Remove it.")
    return content


def _parse_object(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{name} is not valid JSON.") from err
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is not a JSON object.")
    return value


def _refuse_remote_code(name: str, content: bytes) -> None:
    if b"auto_map" in content and "auto_map" in _parse_object(name, content):
        raise ConfigError(f"{name} has 'auto_map': the model asks to run code of its own. Remove that entry.")


def _common_dtype(shards: Sequence[TensorSource]) -> str:
    sizes: dict[str, int] = {}
    for shard in shards:
        for entry in shard.index.entries:
            if entry.dtype in _FLOAT_DTYPES:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    return _TORCH_NAMES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"


def _complete_config(config: dict[str, Any], shards: Sequence[TensorSource]) -> bytes:
    """Write what vLLM looks for in safetensors headers: dtype, a head of its own, modules that AWQ and GPTQ skip."""
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["torch_dtype"] = _common_dtype(shards)
    names = [e.name for s in shards for e in s.index.entries]
    if config.get("tie_word_embeddings") and any(name.endswith("lm_head.weight") for name in names):
        # The checkpoint has a head of its own: tying would silently drop it; vLLM re-ties what turns out equal.
        config["tie_word_embeddings"] = False
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        layers: dict[str, bool] = {}
        for entry in (e for s in shards for e in s.index.entries):
            layer = entry.name.rpartition(".")[0]
            layers[layer] = layers.get(layer, False) or entry.dtype not in _FLOAT_DTYPES
        method = quantization.get("quant_method")
        if method == "awq" and not quantization.get("modules_to_not_convert"):
            quantization["modules_to_not_convert"] = sorted(name for name, quantized in layers.items() if not quantized)
        if method == "gptq" and not quantization.get("modules_in_block_to_quantize"):
            quantization["modules_in_block_to_quantize"] = sorted(n for n, quantized in layers.items() if quantized)
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()


def file_shard(files: Mapping[str, bytes]) -> MemoryShard:
    """Return plain files as a shard of kind 2."""
    tensors = [Tensor(n, "U8", (len(c),), memoryview(c)) for n, c in sorted(files.items())]
    return MemoryShard(tensors, metadata={})
