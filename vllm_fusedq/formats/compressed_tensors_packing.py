"""Tensors of compressed-tensors checkpoints: integer weights of 2 to 8 bits and their scales.

pack-quantized: weight_packed int32 `[N, K / 32 * bits]` packs in_features, weight_zero_point int32
`[N / 32 * bits, G]` (asymmetric only) out_features, both as one stream of bits, lowest first, and
both stored plus half their range. weight_shape holds N and K. Before version 0.18 the package put
`32 // bits` whole codes into each word, which is the same unless bits is 3, 5, 6 or 7.

int-quantized: weight int8 `[N, K]` and weight_zero_point int8 `[N, G]` are the signed integers.

In both weight_scale is `[N, G]`. Source: `pack_to_int32` of the compressed_tensors package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import (
    SCALE_DTYPES,
    Axis,
    Dim,
    LayerFormat,
    Region,
    TensorLayout,
)
from vllm_fusedq.formats.shared.unpacking import take, unpack_columns
from vllm_fusedq.formats.shared.widening import symmetric_zero

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Unpacked: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None]"

SCALE = TensorLayout("weight_scale", (Dim("n"), Dim("g")), SCALE_DTYPES)
SHAPE = TensorLayout("weight_shape", (Dim(None, size=2),), (DType.INT64, DType.INT32))
# The last word of a row holds one multiple of 16 at most, and every rank needs one
ROW_MULTIPLE = 16


def _packed_layouts(bits: int, streaming: bool = True) -> tuple[TensorLayout, ...]:
    def packed(axis: Axis, multiple: int = 1) -> Dim:
        if 32 % bits == 0:
            return Dim(axis, 32 // bits)
        if streaming:
            return Dim(axis, 32, words=bits, multiple=multiple)
        return Dim(axis, 32 // bits, multiple=multiple)

    return (
        TensorLayout("weight_packed", (Dim("n"), packed("k", ROW_MULTIPLE)), (DType.INT32,)),
        SCALE,
        SHAPE,
        TensorLayout("weight_zero_point", (packed("n"), Dim("g")), (DType.INT32,)),
    )


def _unpack_packed(
    tensors: Tensors, layer: LayerFormat, region: Region, streaming: bool = True
) -> Unpacked:
    shape = tensors["weight_shape"].tolist()
    if shape != [layer.n, layer.k]:
        raise WeightLoadError(
            f"{layer.module}.weight_shape: found {shape}, expected {[layer.n, layer.k]} after "
            "the shape of weight_packed; supported are in_features that are a multiple of "
            f"{max(ROW_MULTIPLE, 32 // layer.bits)}; correct version in the config if another one "
            "of compressed-tensors packed the model, or quantize the model again"
        )
    bits, straddling = layer.bits, streaming and 32 % layer.bits > 0
    pack, zeros = 32 if straddling else 32 // bits, None
    if layer.spec.has_zero_points:
        zeros = unpack_columns(tensors["weight_zero_point"].T, bits, straddling)
        zeros = take(zeros, 1, region.n_start, region.n, pack).T.contiguous()
    codes = unpack_columns(tensors["weight_packed"], bits, straddling)
    return take(codes, 1, region.k_start, region.k, pack), zeros


def _plain_layouts(bits: int) -> tuple[TensorLayout, ...]:
    return (
        TensorLayout("weight", (Dim("n"), Dim("k")), (DType.INT8,)),
        SCALE,
        TensorLayout("weight_zero_point", (Dim("n"), Dim("g")), (DType.INT8,)),
    )


def _unpack_plain(tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
    zeros = None
    if layer.spec.has_zero_points:
        zeros = _unsigned(tensors["weight_zero_point"], "weight_zero_point", layer)
    return _unsigned(tensors["weight"], "weight", layer), zeros


def _unsigned(values: torch.Tensor, name: str, layer: LayerFormat) -> torch.Tensor:
    """uint8 codes of signed integers of `layer.bits` bits."""
    half = symmetric_zero(layer.bits)
    low, high = (int(bound) for bound in values.aminmax())
    if low < -half or high >= half:
        raise WeightLoadError(
            f"{layer.module}.{name}: found {low if low < -half else high}, expected {-half} to "
            f"{half - 1} ({layer.bits} bits); correct num_bits in the config, or quantize the "
            "model again"
        )
    # Modulo 256, in which -128 + 128 is 0
    return values.contiguous().view(torch.uint8) + half


class _Packing(NamedTuple):
    """`layouts` of a number of bits, weight first and zero points last; `unpack` gives both."""

    layouts: Callable[[int], tuple[TensorLayout, ...]]
    unpack: Callable[[Tensors, LayerFormat, Region], Unpacked]


DEFAULT_PACKING = "pack-quantized"
PADDED_PACKING = "pack-quantized, padded"
PACKINGS = {
    DEFAULT_PACKING: _Packing(_packed_layouts, _unpack_packed),
    "int-quantized": _Packing(_plain_layouts, _unpack_plain),
    "naive-quantized": _Packing(_plain_layouts, _unpack_plain),
}
"""By the format that a config names."""
VARIANTS = PACKINGS | {
    PADDED_PACKING: _Packing(
        partial(_packed_layouts, streaming=False), partial(_unpack_packed, streaming=False)
    )
}
"""By `LayerFormat.variant`."""
