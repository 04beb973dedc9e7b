"""E2M1 weights in groups: NVFP4 and MXFP4, which several tools store under different names.

The packed weight is uint8 `[N, K / 2]`, the code of the even in_feature in the low nibble. Its
scales are `[N, G]`: E4M3 for groups of 16 (NVFP4), the exponents E8M0 of powers of two as uint8 for
groups of 32 (MXFP4). NVFP4 has one more scale for the whole tensor, fp32: compressed-tensors stores
its reciprocal as weight_global_scale `[1]`, ModelOpt the scale itself as weight_scale_2 `[]`. Parts
of a fused layer may have different ones: here it is a scale of each row.

Source: `pack_fp4_to_uint8` and `mx_utils` of the compressed_tensors package, `NVFP4QTensor` of
ModelOpt, `Pack_fp4` of Quark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight, WeightType
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import (
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_finite,
    check_slices,
)
from vllm_fusedq.formats.packing import Packing
from vllm_fusedq.formats.shared.unpacking import take, unpack_columns

SCALE = "weight_scale"
NVFP4_GROUP, MXFP4_GROUP = 16, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Float4Packing(Packing):
    """`weight` names the packed weight, `scale_of_all` the one scale of NVFP4, if any.

    With `reciprocal` the latter is what scales are divided by.
    """

    bits: int = 4
    weight: str = "weight_packed"
    scale_of_all: str = ""
    reciprocal: bool = False

    def scheme(
        self, stored: Mapping[str, TensorInfo], group_size: int, *, symmetric: bool = True
    ) -> Scheme:
        """The scheme of a module with these headers."""
        exponents = not self.scale_of_all
        dtype = DType.FLOAT8_E8M0FNU if exponents else DType.FLOAT8_E4M3FN
        accepted = (DType.UINT8, dtype) if exponents else (dtype,)
        layouts = (
            TensorLayout(self.weight, (Dim("n"), Dim("k", 2)), (DType.UINT8,)),
            TensorLayout(SCALE, (Dim("n"), Dim("g")), accepted),
        )
        if self.scale_of_all:
            info = stored.get(self.scale_of_all)
            dims = () if info is not None and info.shape == () else (Dim(None, size=1),)
            layouts = (*layouts, TensorLayout(self.scale_of_all, dims, (DType.FLOAT32,)))
        return Scheme(
            *(self, WeightType.FLOAT4_E2M1F, group_size, layouts, SCALE),
            scale_dtype=dtype,
            row_scaled=bool(self.scale_of_all),
        )

    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, SCALE)
        scales = tensors[SCALE].view(layer.spec.scale_dtype.torch)
        check_finite(scales, layer.module, SCALE)
        codes = take(unpack_columns(tensors[self.weight]), 1, region.k_start, region.k, 2)
        phase = region.k_start % layer.spec.group_size
        row_scales = self._row_scales(tensors, layer, region) if self.scale_of_all else None
        return LogicalWeight(
            codes, scales.contiguous(), None, layer.spec, phase, row_scales=row_scales
        )

    def _row_scales(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> torch.Tensor:
        stored = tensors[self.scale_of_all].reshape(1)
        scale = stored.reciprocal() if self.reciprocal else stored
        if not bool((scale > 0) & torch.isfinite(scale)):
            raise WeightLoadError(
                f"{layer.module}.{self.scale_of_all}: found {float(stored)}, expected a positive "
                "number; the file is damaged or was never filled: download or quantize it again"
            )
        return scale.expand(region.n).contiguous()


NVFP4 = Float4Packing(scale_of_all="weight_global_scale", reciprocal=True, name="nvfp4")
MXFP4 = Float4Packing(name="mxfp4")
QUARK_MXFP4 = Float4Packing(weight="weight", name="mxfp4")
MODELOPT_NVFP4 = Float4Packing(weight="weight", scale_of_all="weight_scale_2", name="nvfp4")
