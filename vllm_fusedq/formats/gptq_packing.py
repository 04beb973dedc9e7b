"""Tensors of GPTQ checkpoints: AutoGPTQ's and GPTQModel's packing, and AutoRound's, 2 to 8 bits.

qweight int32 packs in_features, `[K / 32 * bits, N]`, and qzeros int32 `[G, N / 32 * bits]`
out_features, both in order from the lowest bits; 3-, 5-, 6- and 7-bit codes straddle words. scales
`[G, N]`; g_idx int32 `[K]` is each in_feature's group, any group with activation reordering
(desc_act), else `k // group_size` and often missing. Source: `pack_original` and
`convert_gptq_v2_to_v1_format_module` of GPTQModel, `pack_bitstream` of AutoRound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats import gptq_zeros
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
from vllm_fusedq.formats.shared.findings import Finding
from vllm_fusedq.formats.shared.ordering import checked_groups, sort_rows
from vllm_fusedq.formats.shared.widening import resident_type, widen

BITS = (2, 3, 4, 8)
G_IDX = TensorLayout("g_idx", (Dim("k"),), (DType.INT32, DType.INT64))


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqPacking(Packing):
    """`zero_offset` is what has to be added to a stored zero point to get the zero point.

    `conventions` has the names of that in the config.
    """

    zero_offset: int
    conventions: gptq_zeros.Conventions = gptq_zeros.GPTQ

    def scheme(
        self, stored: Mapping[str, TensorInfo], group_size: int, *, symmetric: bool
    ) -> Scheme:
        """The scheme of a module with these headers; `group_size` -1 is all of K."""
        layouts = self._layouts()
        if self.ordered and "qweight" in stored:
            k = layouts[0].dims[0].logical(next(iter(stored["qweight"].shape), 0))
            layouts = with_all_groups(layouts, -(-k // group_size))
        with_g_idx = self.ordered or G_IDX.name in stored
        return Scheme(
            self,
            resident_type(self.bits, symmetric),
            group_size,
            (*layouts, G_IDX) if with_g_idx else layouts,
            scales="scales",
        )

    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, "scales")
        zeros = gptq_zeros.zero_points(tensors["qzeros"], self, layer, region)
        codes = gptq_zeros.unpack(tensors["qweight"].T, self.bits, region.k_start, region.k)
        codes = widen(codes, layer)
        scales = tensors["scales"].T.contiguous()
        if self.ordered:
            return sort_rows(codes, scales, zeros, tensors[G_IDX.name], G_IDX.name, layer, region)
        if layer.tensor(G_IDX.name):
            _check_order(tensors[G_IDX.name], layer, region)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)

    def evidence(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> Finding | None:
        check_slices(tensors, layer, region, "scales")
        if self.ordered:
            groups = checked_groups(tensors[G_IDX.name], G_IDX.name, layer)
        else:
            rows = torch.arange(region.k_start, region.k_stop)
            groups = (rows // layer.spec.group_size).to(tensors["qzeros"].device)
            groups -= region.k_start // layer.spec.group_size
        return gptq_zeros.judge(tensors["qweight"], tensors["qzeros"], groups, self, layer, region)

    def _layouts(self) -> tuple[TensorLayout, ...]:
        def packed(axis: Axis) -> Dim:
            if gptq_zeros.straddles(self.bits):
                return Dim(axis, 32, words=self.bits, multiple=32)
            return Dim(axis, 32 // self.bits)

        return (
            TensorLayout("qweight", (packed("k"), Dim("n")), (DType.INT32,)),
            TensorLayout("qzeros", (Dim("g"), packed("n")), (DType.INT32,)),
            TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
        )


def _check_order(g_idx: torch.Tensor, layer: LayerFormat, region: Region) -> None:
    rows = torch.arange(region.k_start, region.k_stop, device=g_idx.device)
    wrong = (g_idx != rows // layer.spec.group_size).nonzero()
    if len(wrong):
        row = int(wrong[0])
        k = region.k_start + row
        raise WeightLoadError(
            f"{layer.module}.g_idx: found in_feature {k} in group {int(g_idx[row])} "
            f"({len(wrong)} of {region.k} in_features are out of order), expected group "
            f"{k // layer.spec.group_size} of size {layer.spec.group_size} without activation "
            "reordering; set desc_act to true and static_groups to false in the config if this "
            "model was quantized with it"
        )
