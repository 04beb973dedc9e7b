"""One layer of a checkpoint without a file: its stored tensors, its description, its slices."""

import torch

from checkpoints import BUILDS, ORDERED_BUILDS, Tensors, Truth
from vllm_fusedq.checkpoint import Checkpoint
from vllm_fusedq.formats import LayerFormat, Region, format_for, stored_slices
from vllm_fusedq.safetensors_header import TensorInfo

MODULE = "model.layers.0.mlp.up_proj"
DTYPE_NAMES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def describe(
    build: str, truth: Truth, group_size: int, **options: object
) -> tuple[LayerFormat, Tensors]:
    """The stored tensors of one layer and its description, without a file."""
    made = (BUILDS | ORDERED_BUILDS)[build]
    tensors = made.tensors(truth)
    infos = {
        f"{MODULE}.{name}": TensorInfo(name, DTYPE_NAMES[t.dtype], tuple(t.shape), "x")
        for name, t in tensors.items()
    }
    config = {**made.config(group_size), **options}
    layer = format_for(Checkpoint("x", {}, config, "quantization_config", infos)).spec_for(MODULE)
    assert layer is not None
    return layer, tensors


def cut(layer: LayerFormat, tensors: Tensors, region: Region) -> Tensors:
    group_size = layer.spec.group_size
    return {t.name: tensors[t.name][stored_slices(t, region, group_size)] for t in layer.tensors}
