"""Four-bit weights in three forms become the ordinary ones that they stand for, where vLLM has no kernel for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.sealed.packed import AWQ, GPTQ, GROUP
from server.sealed.quantize import CompressedTensors

# What is imported here, in the tests, goes through a part of torch that announces its end.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

N, K = 96, 256


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.model_executor import parameter
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.auto_awq import _convert_awq_to_standard_format
    from vllm.platforms.interface import PlatformEnum
    from vllm.scalar_type import scalar_types

    from server.engine.vllm import int4

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)

    def config(weight_type: str, *, zero_points: bool = False) -> Any:
        return linear.MPLinearLayerConfig(
            full_weight_shape=(K, N), partition_weight_shape=(K, N), act_type=torch.bfloat16, group_size=GROUP,
            weight_type=getattr(scalar_types, weight_type), zero_points=zero_points,
        )  # fmt: skip

    def packed(data: torch.Tensor, input_dim: int, packed_dim: int) -> Any:
        return parameter.PackedvLLMParameter(
            data=data.contiguous(), input_dim=input_dim, output_dim=1 - input_dim, packed_dim=packed_dim,
            packed_factor=8, weight_loader=lambda *_: None,
        )  # fmt: skip

    def scales(data: torch.Tensor, input_dim: int) -> Any:
        return parameter.GroupQuantScaleParameter(
            data=data.to(torch.bfloat16).contiguous(), input_dim=input_dim, output_dim=1 - input_dim,
            weight_loader=lambda *_: None,
        )  # fmt: skip

    return SimpleNamespace(
        int4=int4, linear=linear, cpu=PlatformEnum.CPU, config=config, packed=packed, scales=scales,
        convert_awq=_convert_awq_to_standard_format,
    )  # fmt: skip


def load(vllm: Any, form: str, layer: Any, weight: torch.Tensor) -> None:
    """Put a quantized weight into a layer as vLLM's loader does."""
    if form == "gptq":
        _, words, _, scale = GPTQ().apply(weight)
        layer.qweight, layer.scales = vllm.packed(words, 0, 0), vllm.scales(scale, 0)
    elif form == "awq":
        words, zeros, scale = AWQ().apply(weight)
        layer.qweight, layer.qzeros = vllm.packed(words, 0, 1), vllm.packed(zeros, 0, 1)
        layer.scales = vllm.scales(scale, 0)
        vllm.convert_awq(layer, "qweight", "qzeros", 4)
    else:
        words, scale, _ = CompressedTensors(4, GROUP).apply(weight)
        layer.qweight, layer.scales = vllm.packed(words, 1, 1), vllm.scales(scale, 1)


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_the_opened_weights_are_near_the_original(vllm: Any, form: str) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3)) + 0.5
    layer: Any = torch.nn.Module()
    load(vllm, form, layer, weight.to(torch.bfloat16))
    has_zeros = form == "awq"
    config = vllm.config("uint4" if has_zeros else "uint4b8", zero_points=has_zeros)
    kernel = vllm.int4.Int4AsFloat(config, "qweight", "scales", "qzeros")
    kernel.process_weights_after_loading(layer)
    opened = kernel.apply_weights(layer, torch.eye(K, dtype=torch.bfloat16)).float().t()
    assert (opened - weight).norm() / weight.norm() < 0.12
    assert not sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "weight")


@pytest.mark.parametrize(
    ("is_there", "weight_type", "taken"),
    [(False, "uint4", True), (False, "uint4b8", True), (False, "uint8b128", False), (True, "uint4", False)],
)
def test_only_four_bits_and_only_where_vllm_has_no_kernel(
    vllm: Any, is_there: bool, weight_type: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm.int4, "has_own_kernel", lambda: is_there)
    assert vllm.int4.Int4AsFloat.can_implement(vllm.config(weight_type))[0] is taken


def test_it_is_offered_once_and_first(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = vllm.linear.CPUWNA16LinearKernel
    monkeypatch.setitem(vllm.linear._POSSIBLE_KERNELS, vllm.cpu, [own])
    vllm.int4.register_int4()
    vllm.int4.register_int4()
    assert vllm.linear._POSSIBLE_KERNELS[vllm.cpu] == [vllm.int4.Int4AsFloat, own]
