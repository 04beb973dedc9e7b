"""Blocks of 8-bit floats by the formula of vLLM."""

import pytest
import torch

from checkpoints import ALL_BUILDS
from fusedq_kernels import reference
from layers import cut, describe


@pytest.mark.parametrize("block", [[128, 128], [64, 32]])
def test_blocks_are_worth_what_vllm_says(block: list[int]) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        GroupShape,
        scaled_dequantize,
    )

    n, k = 256, 384
    tensors = ALL_BUILDS["fp8-block"].tensors(ALL_BUILDS["fp8-block"].truth(n, k, 32))
    tensors["weight_scale_inv"] = torch.rand(n // block[0], k // block[1])
    layer, _ = describe("fp8-block", None, 32, tensors, weight_block_size=block)
    weight = layer.packing.logical(cut(layer, tensors, layer.whole), layer, layer.whole)
    theirs = scaled_dequantize(
        tensors["weight"], tensors["weight_scale_inv"], GroupShape(*block), torch.float32
    )
    assert torch.equal(reference.dequantize(weight), theirs)
