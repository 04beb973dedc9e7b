"""Tensors of compressed-tensors checkpoints: integer weights of 2 to 8 bits and their scales.

pack-quantized: weight_packed int32 `[N, K / 32 * bits]` packs in_features, weight_zero_point int32
`[N / 32 * bits, G]` (asymmetric only) out_features, both as one stream of bits, lowest first, and
both stored plus half their range. weight_shape holds N and K. Before version 0.18 the package put
`32 // bits` whole codes into each word, which is the same unless bits is 3, 5, 6 or 7.

int-quantized: weight int8 `[N, K]` and weight_zero_point int8 `[N, G]` are the signed integers.

In both weight_scale is `[N, G]`; with actorder group, weight_g_idx int32 `[K]` is each in_feature's
group, or -1 throughout. Source: `pack_to_int32` of the compressed_tensors package.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import (
    SCALE_DTYPES,
    Axis,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_slices,
    with_all_groups,
)
from vllm_fusedq.formats.packing import Packing
from vllm_fusedq.formats.shared.ordering import sort_rows
from vllm_fusedq.formats.shared.unpacking import take, unpack_columns
from vllm_fusedq.formats.shared.widening import resident_type, symmetric_zero, widen

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Unpacked: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None]"

SCALE = TensorLayout("weight_scale", (Dim("n"), Dim("g")), SCALE_DTYPES)
SHAPE = TensorLayout("weight_shape", (Dim(None, size=2),), (DType.INT64, DType.INT32))
G_IDX = TensorLayout("weight_g_idx", (Dim("k"),), (DType.INT32, DType.INT64))
# The last word of a row holds one multiple of 16 at most, and every rank needs one
ROW_MULTIPLE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensorsPacking(Packing):
    """What the packings have in common: scales, and the order of groups."""

    @abstractmethod
    def layouts(self) -> tuple[TensorLayout, ...]:
        """The packed weight first, the zero points last."""

    @abstractmethod
    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        """Unsigned codes as stored and zeros of a region, of tensors that are checked."""

    def scheme(
        self, stored: Mapping[str, TensorInfo], group_size: int, *, symmetric: bool
    ) -> Scheme:
        """The scheme of a module with these headers; `group_size` -1 is all of K."""
        layouts = self.layouts()[:-1] if symmetric else self.layouts()
        if self.ordered:
            weight = layouts[0]
            shape = stored[weight.name].shape if weight.name in stored else ()
            k = weight.dims[-1].logical(shape[-1]) if shape else 0
            layouts = (*with_all_groups(layouts, -(-k // group_size)), G_IDX)
        weight_type = resident_type(self.bits, symmetric)
        return Scheme(self, weight_type, group_size, layouts, scales=SCALE.name)

    def logical(self, tensors: Tensors, layer: LayerFormat, region: Region) -> LogicalWeight:
        check_slices(tensors, layer, region, SCALE.name)
        codes, zeros = self.unpack(tensors, layer, region)
        codes = widen(codes, layer)
        scales = tensors[SCALE.name].contiguous()
        if self.ordered:
            g_idx = _explicit_order(tensors[G_IDX.name], layer, region)
            return sort_rows(codes, scales, zeros, g_idx, G_IDX.name, layer, region)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordPacking(CompressedTensorsPacking):
    """pack-quantized; `streaming` where codes that divide no word straddle words.

    `shaped` where weight_shape is of this weight, and not of what it is a piece of.
    """

    streaming: bool = True
    shaped: bool = True

    def layouts(self) -> tuple[TensorLayout, ...]:
        return (
            TensorLayout("weight_packed", (Dim("n"), self._dim("k", ROW_MULTIPLE)), (DType.INT32,)),
            SCALE,
            *((SHAPE,) if self.shaped else ()),
            TensorLayout("weight_zero_point", (self._dim("n"), Dim("g")), (DType.INT32,)),
        )

    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        whole = [layer.n, layer.k]
        shape = tensors[SHAPE.name].tolist() if self.shaped else whole
        if shape != whole:
            raise WeightLoadError(
                f"{layer.module}.weight_shape: found {shape}, expected {whole} after "
                "the shape of weight_packed; supported are in_features that are a multiple of "
                f"{max(ROW_MULTIPLE, 32 // self.bits)}; correct version in the config if another "
                "one of compressed-tensors packed the model, or quantize the model again"
            )
        straddling = self.streaming and 32 % self.bits > 0
        pack, zeros = 32 if straddling else 32 // self.bits, None
        if layer.spec.has_zero_points:
            zeros = unpack_columns(tensors["weight_zero_point"].T, self.bits, straddling)
            zeros = take(zeros, 1, region.n_start, region.n, pack).T.contiguous()
        codes = unpack_columns(tensors["weight_packed"], self.bits, straddling)
        return take(codes, 1, region.k_start, region.k, pack), zeros

    def _dim(self, axis: Axis, multiple: int = 1) -> Dim:
        if 32 % self.bits == 0:
            return Dim(axis, 32 // self.bits)
        if self.streaming:
            return Dim(axis, 32, words=self.bits, multiple=multiple)
        return Dim(axis, 32 // self.bits, multiple=multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class BytePacking(CompressedTensorsPacking):
    """int-quantized, which other versions call naive-quantized: a byte per integer."""

    def layouts(self) -> tuple[TensorLayout, ...]:
        return (
            TensorLayout("weight", (Dim("n"), Dim("k")), (DType.INT8,)),
            SCALE,
            TensorLayout("weight_zero_point", (Dim("n"), Dim("g")), (DType.INT8,)),
        )

    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        zeros = None
        if layer.spec.has_zero_points:
            zeros = self._unsigned(tensors, "weight_zero_point", layer)
        return self._unsigned(tensors, "weight", layer), zeros

    def _unsigned(self, tensors: Tensors, name: str, layer: LayerFormat) -> torch.Tensor:
        """uint8 codes of signed integers of `self.bits` bits."""
        values, half = tensors[name], symmetric_zero(self.bits)
        low, high = (int(bound) for bound in values.aminmax())
        if low < -half or high >= half:
            raise WeightLoadError(
                f"{layer.module}.{name}: found {low if low < -half else high}, expected {-half} to "
                f"{half - 1} ({self.bits} bits); correct num_bits in the config, or quantize the "
                "model again"
            )
        # Modulo 256, in which -128 + 128 is 0
        return values.contiguous().view(torch.uint8) + half


def _explicit_order(g_idx: torch.Tensor, layer: LayerFormat, region: Region) -> torch.Tensor:
    """weight_g_idx, where -1 throughout means the order of in_features."""
    if bool((g_idx != -1).any()):
        return g_idx
    rows = torch.arange(region.k_start, region.k_stop, device=g_idx.device)
    return rows // layer.spec.group_size
