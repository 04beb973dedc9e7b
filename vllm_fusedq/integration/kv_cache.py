"""vLLM's own KV-cache method for the attention layers that the checkpoint has scales of."""

import math
from collections.abc import Set

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats.base import USE_VLLM
from vllm_fusedq.formats.kv_cache import SCALES, SHARED_SCALE, ZERO_POINTS
from vllm_fusedq.integration.config import FusedQConfig
from vllm_fusedq.plan.kv_cache import kv_dtype_problems, scaled_attention
from vllm_fusedq.worker.state import WorkerState

NOT_LOADED = -1.0  # BaseKVCacheMethod's


def kv_cache_method(
    layer: Attention, prefix: str, config: FusedQConfig, state: WorkerState
) -> BaseKVCacheMethod | None:
    """vLLM's method for a layer that the checkpoint has scales of; None leaves the layer to vLLM.

    Raises:
        PreflightError: the checkpoint's scales are not for this layer's KV cache.
    """
    fmt = config.format
    attention = scaled_attention(prefix, fmt, config.renamed_modules)
    if attention is None:
        return None
    if problems := kv_dtype_problems(fmt, layer.kv_cache_dtype):
        raise PreflightError(problems)
    return CheckedKVCacheMethod(config, state, attention, fmt.kv_tensors[attention].keys())


class CheckedKVCacheMethod(BaseKVCacheMethod):
    """Makes sure that every scale of the attention module `attention` arrives, bit for bit.

    `parts` are the checkpoint's tensors for it: scales, and zero points, which tools also write
    where the scheme is symmetric and they are 0.
    """

    def __init__(
        self,
        quant_config: QuantizationConfig,
        state: WorkerState,
        attention: str,
        parts: Set[str],
    ) -> None:
        super().__init__(quant_config)
        self.state, self.attention, self.parts = state, attention, parts

    def create_weights(self, layer: torch.nn.Module) -> None:
        super().create_weights(layer)
        for name in SCALES:
            # vLLM's are of the activations' dtype and would round
            parameter = getattr(layer, name)
            parameter.data = parameter.data.float()
        for name in self.parts & set(ZERO_POINTS):
            zero = torch.zeros(1, dtype=torch.float32)
            layer.register_parameter(name, torch.nn.Parameter(zero, requires_grad=False))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if hasattr(layer, SCALES[0]):  # vLLM's own is called again without them
            with self.state.guard():
                self._check(layer)
            for name in self.parts & set(ZERO_POINTS):
                delattr(layer, name)
        super().process_weights_after_loading(layer)

    def _check(self, layer: torch.nn.Module) -> None:
        for part in self.parts:
            name = f"{self.attention}.{part}"
            value = getattr(layer, SCALES[0] if part == SHARED_SCALE else part).item()
            if part in ZERO_POINTS:
                if value != 0:
                    raise WeightLoadError(
                        f"{name}: found the zero point {value:g}, expected 0, as for symmetric "
                        f"scales; quantize the model again, or {USE_VLLM}"
                    )
            elif value == NOT_LOADED:
                raise WeightLoadError(
                    f"{name}: found no value after loading, expected the file's; vLLM's code for "
                    f"this model does not load it: remove it from the file, or {USE_VLLM}"
                )
            elif not (math.isfinite(value) and value > 0):
                raise WeightLoadError(
                    f"{name}: found the scale {value:g}, expected a positive number; quantize the "
                    f"model again, or {USE_VLLM}"
                )
