"""vLLM's default loader with its iterator exchanged: weights come from a sealed model (load format `strongroom`)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from server.engine.vllm.weights import SealedWeights
from server.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch


class StrongroomLoader(DefaultModelLoader):
    """Loads a sealed model of any quantization that vLLM's default loader serves."""

    def __init__(self, load_config: Any) -> None:
        self._weights, stripped = SealedWeights.take(load_config)
        super().__init__(stripped)

    def download_model(self, model_config: Any) -> None:
        """Nothing to fetch: a sealed model is a local folder."""

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: whoever asks wants plain weight files."""
        del args, kwargs
        raise StartError("Something in the engine asked for plain weight files; a sealed model has none.")

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load, with the process guarded and the key agent at hand."""
        with self._weights.loading():
            return super().load_model(*args, **kwargs)

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, torch.Tensor]]:
        """Yield every tensor by name, sealed still."""
        if getattr(model, "secondary_weights", ()):
            raise StartError("This model wants weights of a second model; a sealed model holds one.")
        self.counter_before_loading_weights = time.perf_counter()
        for name, tensor in self._weights.tensors(model_config.model, into=model.parameters()):
            if not should_skip_weight(name, self.local_expert_ids):
                yield name, tensor if self._weights.lazy else tensor.decrypt()
