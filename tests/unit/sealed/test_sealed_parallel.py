"""vLLM's own parameters, on one of two ranks, take from a sealed tensor the slices that they take from a plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.parameter import ModelWeightParameter

from server.engine.vllm.lazy import SealedTensor
from tests.unit.sealed.test_sealed_lazy import opened
from tests.unit.sealed.workshop import open_workshop, plaintext, small_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Shape of the rank's parameter, and how a layer of vLLM's has it loaded from a weight of 300 rows and 256 columns.
LAYERS: dict[str, tuple[tuple[int, int], Callable[[Any, torch.Tensor], None]]] = {
    "row parallel": ((300, 128), lambda p, w: p.load_row_parallel_weight(loaded_weight=w)),
    "column parallel": ((150, 256), lambda p, w: p.load_column_parallel_weight(loaded_weight=w)),
    "merged columns": (
        (300, 256),
        lambda p, w: p.load_merged_column_weight(loaded_weight=w, shard_offset=150, shard_size=150),
    ),
    "qkv": (
        (450, 256),
        lambda p, w: p.load_qkv_weight(loaded_weight=w, shard_offset=300, shard_size=150, shard_id="v", num_heads=1),
    ),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("shape", "load"), LAYERS.values(), ids=LAYERS)
def test_a_rank_gets_its_slice_and_no_whole_tensor_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], load: Any, rank: int
) -> None:
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(SealedTensor, "decrypt", lambda *_: pytest.fail("opened whole"))

    def new_parameter() -> ModelWeightParameter:
        data = torch.zeros(shape, dtype=torch.bfloat16)
        return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=lambda *_: None)

    plain = torch.frombuffer(bytearray(plaintext(small_source())["embed"]), dtype=torch.bfloat16).reshape(300, 256)
    expected, parameter = new_parameter(), new_parameter()
    load(expected, plain)
    assert expected.data.any()
    workshop = open_workshop(tmp_path)
    with opened(workshop, workshop.seal()) as reader:
        load(parameter, SealedTensor(reader, "embed", 0, (300, 256), torch.bfloat16))
    assert torch.equal(parameter.data.view(torch.int16), expected.data.view(torch.int16))
