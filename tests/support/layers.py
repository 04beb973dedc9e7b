"""One layer of a checkpoint: its stored tensors, description and slices, without a file; its
problems.
"""

import torch

from checkpoints import ALL_BUILDS, Tensors, Truth
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats import (
    CheckpointFormat,
    LayerFormat,
    Region,
    format_for,
    stored_slices,
)

MODULE = "model.layers.0.mlp.up_proj"
DTYPE_NAMES = {
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def describe(
    build: str,
    truth: Truth | None,
    group_size: int,
    tensors: Tensors | None = None,
    **options: object,
) -> tuple[LayerFormat, Tensors]:
    """The stored tensors of one layer and its description, without a file.

    `tensors` replaces the stored tensors, `options` entries of the quantization config.
    """
    made = ALL_BUILDS[build]
    tensors = tensors or made.tensors(truth)
    stored = {f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}
    infos = {
        name: TensorInfo(name, DTYPE_NAMES[t.dtype], tuple(t.shape), "x")
        for name, t in stored.items()
    }
    config = {**made.config(group_size), **options}
    small = {n: t.numpy().tobytes() for n, t in stored.items() if t.dtype == torch.uint8}
    checkpoint = Checkpoint("x", {}, config, "quantization_config", infos, small)
    layer = format_for(checkpoint).layer_of(MODULE)
    assert layer is not None
    return layer, tensors


def problems_of(fmt: CheckpointFormat, module: str) -> list[Problem]:
    """Everything that stands against a module; empty if it is fine or left unquantized."""
    try:
        fmt.layer_of(module)
    except PreflightError as error:
        return list(error.problems)
    return []


def cut(layer: LayerFormat, tensors: Tensors, region: Region) -> Tensors:
    group_size = layer.spec.group_size
    return {
        t.name: layer.grid(t, tensors[t.name])[stored_slices(t, region, group_size)]
        for t in layer.tensors
    }


def check(layer: LayerFormat, tensors: Tensors, region: Region, truth: Truth) -> None:
    """Decoding the region's slices gives exactly the truth of the region."""
    weight = layer.packing.logical(cut(layer, tensors, region), layer, region)
    bounds = (region.n_start, region.n_stop, region.k_start, region.k_stop)
    codes, zeros, scales = truth.slice(*bounds)
    assert weight.codes.dtype == torch.uint8
    assert torch.equal(weight.codes, codes)
    assert weight.scales.dtype == layer.spec.scale_dtype.torch
    assert weight.scales.dtype == scales.dtype
    # PyTorch does not compare 8-bit floats
    assert torch.equal(weight.scales.double(), scales.double())
    assert weight.phase == region.k_start % truth.group_size
    assert weight.spec == layer.spec
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    if weight.row_scales is not None:
        assert torch.equal(weight.row_scales, torch.full((region.n,), truth.scale_of_all))
    if zeros is None:
        assert weight.zeros is None
    else:
        assert weight.zeros is not None
        assert weight.zeros.dtype == torch.uint8
        assert torch.equal(weight.zeros, zeros)
