"""Integers of AMD Quark: AWQ's words of out_features, with signs.

weight int32 `[K, N / 8]` and weight_zero_point int32 `[G, N / 8]` pack out_features: nibble i of
word w is out_feature `8 * w + order[i]`. weight_scale `[G, N]`. dtype int4 stores both in two's
complement, and zero points of 0 where it is symmetric; uint4 stores both as they are. A weight is
`(code - zero) * scale`. Source: `Pack_4_bits` and `StaticScaledRealQuantizer` of Quark,
`canonicalize_quark_packed_int4` of vLLM, which has no signed zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.awq_packing import ORDER
from vllm_fusedq.formats.layer import (
    SCALE_DTYPES,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_slices,
)
from vllm_fusedq.formats.packing import Packing
from vllm_fusedq.formats.shared.unpacking import IN_ORDER, NIBBLES, take, unpack_rows
from vllm_fusedq.formats.shared.widening import resident_type, symmetric_zero

ORDERS = {"reorder": ORDER, "order": IN_ORDER}
"""By `pack_method`."""

_WORDS = Dim("n", NIBBLES)
WEIGHT = TensorLayout("weight", (Dim("k"), _WORDS), (DType.INT32,))
SCALE = TensorLayout("weight_scale", (Dim("g"), Dim("n")), SCALE_DTYPES)
ZERO_POINT = TensorLayout("weight_zero_point", (Dim("g"), _WORDS), (DType.INT32,))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarkIntPacking(Packing):
    """`order` is one of `ORDERS`; `signed`: in two's complement."""

    bits: int = 4
    order: tuple[int, ...]
    signed: bool
    symmetric: bool

    def scheme(self, stored: Mapping[str, TensorInfo], group_size: int) -> Scheme:
        """The scheme of a module with these headers."""
        with_zeros = not self.symmetric or ZERO_POINT.name in stored
        layouts = (WEIGHT, SCALE, *((ZERO_POINT,) if with_zeros else ()))
        weight_type = resident_type(self.bits, self.symmetric)
        return Scheme(self, weight_type, group_size, layouts, SCALE.name)

    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, SCALE.name)
        zeros = None
        if layer.tensor(ZERO_POINT.name):
            zeros = self._unsigned(tensors[ZERO_POINT.name], region)
            if self.symmetric:
                _check_symmetric(zeros, layer)
                zeros = None
        codes = self._unsigned(tensors[WEIGHT.name], region)
        scales = tensors[SCALE.name].T.contiguous()
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)

    def _unsigned(self, words: torch.Tensor, region: Region) -> torch.Tensor:
        """uint8 `[region.n, R]` of int32 `[R, W]`, 8 more than the signed codes."""
        codes = take(unpack_rows(words.T, order=self.order), 0, region.n_start, region.n)
        return codes.bitwise_xor_(symmetric_zero(self.bits)) if self.signed else codes


def _check_symmetric(zeros: torch.Tensor, layer: LayerFormat) -> None:
    half = symmetric_zero(layer.packing.bits)
    if wrong := int((zeros != half).sum()):
        raise WeightLoadError(
            f"{layer.module}.{ZERO_POINT.name}: found {wrong} zero points that are not 0, expected "
            "0 of symmetric weights; set symmetric to false in the config if this model was "
            "quantized with zero points, or download the checkpoint again"
        )
