"""The bitsandbytes plug-in's loader with its iterator exchanged; it forces its own load format on such models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

from server.engine.vllm.weights import SealedWeights

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

_SEALED_KEY = "manifest_sha256"


class SealedBitsAndBytesLoader(BitsAndBytesModelLoader):
    """Quantizes sealed weights in flight, or loads sealed pre-quantized ones; plain models load as they did."""

    def __init__(self, load_config: Any) -> None:
        self._weights: SealedWeights | None = None
        self._folder = ""
        if _SEALED_KEY in (load_config.model_loader_extra_config or {}):
            self._weights, load_config = SealedWeights.take(load_config)
        super().__init__(load_config)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load, with the process guarded and the key agent at hand."""
        if self._weights is None:
            return super().load_model(*args, **kwargs)
        with self._weights.loading():
            return super().load_model(*args, **kwargs)

    def download_model(self, model_config: Any) -> None:
        """Nothing to fetch for a sealed model."""
        if self._weights is None:
            super().download_model(model_config)

    def _prepare_weights(self, model_name_or_path: str, revision: str | None) -> tuple[list[str], bool]:
        if self._weights is None:
            files: tuple[list[str], bool] = super()._prepare_weights(model_name_or_path, revision)
            return files
        self._folder = model_name_or_path
        return [], True

    def _hf_weight_iter(self, hf_weights_files: Any, use_safetensors: bool) -> Generator[tuple[str, str, torch.Tensor]]:
        if self._weights is None:
            yield from super()._hf_weight_iter(hf_weights_files, use_safetensors)
            return
        for name, tensor in self._weights.tensors(self._folder):
            # The base class keeps what it is given: each is a tensor of its own. Pooling models get a prefix.
            mapped = self.weight_mapper(name)
            if self.is_pool_model and self.target_modules[0].startswith("model.") and not mapped.startswith("model."):
                mapped = "model." + mapped
            yield name, mapped, tensor.decrypt()
