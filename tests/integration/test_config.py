"""vLLM's quantization config as vLLM itself makes it."""

import pytest
import torch

from tiny_models import asset
from vllm_fusedq.errors import UnsupportedCheckpoint


def test_quantizing_while_loading_is_refused() -> None:
    """vLLM would do it to the layers that the checkpoint leaves unquantized, and no plan say so."""
    from vllm.config import LoadConfig, ModelConfig, VllmConfig
    from vllm.config.quantization import resolve_quantization_config

    from vllm_fusedq.integration.register import register_plugin

    register_plugin()
    online = resolve_quantization_config("fusedq", {"linear": "fp8_per_tensor"})
    model = ModelConfig(
        str(asset("tiny-llama-awq-g128")),
        quantization="fusedq",
        quantization_config=online,
        dtype=torch.float16,
    )
    message = "tiny-llama-awq-g128: found --quantization-config, by which vLLM quantizes layers"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        VllmConfig.get_quantization_config(model, LoadConfig())
