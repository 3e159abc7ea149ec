"""Four-bit linear layers on processors without AVX-512, for which vLLM's CPU build has no four-bit kernel."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

if TYPE_CHECKING:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig

logger = logging.getLogger("strongroom.engine")

_TYPES: Final = (scalar_types.uint4, scalar_types.uint4b8)


def register_int4() -> None:
    """Offer the kernel below before vLLM's own, which claims every CPU; safe to call more than once."""
    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if Int4AsFloat not in kernels:
        kernels.insert(0, Int4AsFloat)


def has_own_kernel() -> bool:
    """Whether vLLM's compiled code for this processor has its four-bit kernel."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "This processor has no AVX-512, and vLLM's CPU build no four-bit kernel for it: four-bit weights became "
        "ordinary ones. They save disk, but neither memory nor time; w8a8 saves both."
    )


class Int4AsFloat(MPLinearKernel):
    """Makes ordinary weights of four-bit ones once they are loaded; they take the memory and time of a bf16 model."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Any CPU."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Only where vLLM's own kernel is missing."""
        if has_own_kernel():
            return False, "vLLM's own kernel is there"
        if c.weight_type not in _TYPES:
            return False, f"{c.weight_type} is no four-bit type"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put `[N, K]` weights in place of the packed ones, as of an unquantized layer."""
        _warn_once()
        packed, scales, zeros = self._get_weight_params(layer)
        wanted: Any = self.config.weight_type
        # GPTQ packs along the input: [K/8, N] with scales [K/group, N]; compressed-tensors has both transposed.
        columns = packed.data.t() if packed.input_dim == 1 else packed.data
        scale = scales.data.t() if scales.output_dim == 0 else scales.data
        integers = unpack_quantized_values_into_int32(columns, wanted, 0)
        if zeros is not None and self.config.zero_points:
            rows = zeros.data.t() if zeros.output_dim == 0 else zeros.data
            zero = unpack_quantized_values_into_int32(rows, wanted, 1)
        else:
            zero = torch.full_like(scale, wanted.bias, dtype=torch.int32)
        num_groups, num_outputs = scale.shape
        grouped = integers.reshape(num_groups, -1, num_outputs) - zero[:, None]
        weight = (grouped * scale[:, None].float()).to(self.config.act_type).reshape(-1, num_outputs).t().contiguous()
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and hasattr(layer, name):
                replace_parameter(layer, name, torch.nn.Parameter(torch.empty(0), requires_grad=False))
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As an unquantized layer."""
        result: torch.Tensor = layer.cpu_linear(x, layer.weight, bias)
        return result
