"""Tensors of linears with 8-bit floats (E4M3): whose they are, only the config of a tool says.

weight float8_e4m3fn `[N, K]`, and scales that multiply it: one for all (`[]`, `[1]` or `[1, 1]`),
one for each out_feature (`[N]` or `[N, 1]`), or one for each block of `rows` out_features and as
many in_features as a group has, `[ceil(N / rows), ceil(K / group_size)]`, which ModelOpt stores as
`[ceil(N / rows), 1, ceil(K / group_size), 1]`. Scales of dtype float8_e8m0fnu, and uint8 ones where
the format has powers of two for scales (MXFP8), are E8M0; bf16 holds the same numbers. Source:
`dequantize` of the compressed_tensors package, `FP8Linear` of transformers' `finegrained_fp8`,
`create_fp8_scale_parameter` of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight, WeightType
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import (
    DTYPES,
    SCALE_DTYPES,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_finite,
    check_slices,
)
from vllm_fusedq.formats.packing import Packing

WEIGHT = TensorLayout("weight", (Dim("n"), Dim("k")), (DType.FLOAT8_E4M3FN,))
MXFP8_GROUP = 32
_EXPONENTS = (DType.UINT8, DType.FLOAT8_E8M0FNU)
BLOCKS = "two sizes [out_features, in_features], the second a multiple of 8"
# Of both NaN, without the sign
_NAN = 0x7F


def is_block(found: object) -> bool:
    """Whether a config's entry is the size of a block."""
    sizes = found if isinstance(found, list) and len(found) == 2 else [0, 0]
    return all(type(size) is int and size > 0 for size in sizes) and sizes[1] % 8 == 0


def check_numbers(codes: torch.Tensor, module: str, name: str) -> None:
    """Raise WeightLoadError where a code, uint8, is NaN, which kernels take for a number."""
    missing = int(((codes & _NAN) == _NAN).sum())
    if missing:
        raise WeightLoadError(
            f"{module}.{name}: found {missing} codes of NaN, expected numbers; the file is damaged "
            "or the model was quantized from NaN: download or quantize it again"
        )


class ScaleOf(Enum):
    """What has a scale of its own."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8Packing(Packing):
    """`scale` is the scales' tensor; `rows` of a block, which as a group has one row.

    With `exponents` scales are E8M0 and may be stored as uint8.
    """

    bits: int = 8
    scale: str
    scale_of: ScaleOf
    rows: int = 1
    exponents: bool = False

    def scheme(
        self, stored: Mapping[str, TensorInfo], group_size: int = -1, *, symmetric: bool = True
    ) -> Scheme:
        """The scheme of a module with these headers; blocks are of `group_size` in_features."""
        info = stored.get(self.scale)
        dims = self._dims(1 if info is None else len(info.shape))
        known = _EXPONENTS if self.exponents else (*SCALE_DTYPES, DType.FLOAT8_E8M0FNU)
        layouts = (WEIGHT, TensorLayout(self.scale, dims, known))
        found = None if info is None else DTYPES.get(info.dtype)
        return Scheme(
            *(self, WeightType.FLOAT8_E4M3FN, group_size, layouts, self.scale),
            scale_dtype=DType.BFLOAT16 if self.exponents or found in _EXPONENTS else None,
        )

    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, self.scale)
        codes = tensors[WEIGHT.name].contiguous().view(torch.uint8)
        check_numbers(codes, layer.module, WEIGHT.name)
        scales = tensors[self.scale]
        if scales.itemsize == 1:
            scales = scales.view(torch.float8_e8m0fnu)
            check_finite(scales, layer.module, self.scale)
            scales = scales.to(torch.bfloat16)
        if self.scale_of is ScaleOf.TENSOR:
            scales = scales.reshape(1, 1).expand(region.n, 1)
        elif self.scale_of is ScaleOf.CHANNEL:
            scales = scales.reshape(region.n, 1)
        else:
            scales = scales.reshape(scales.shape[0], -1)
        if self.rows > 1:
            rows = torch.arange(region.n_start, region.n_stop, device=scales.device)
            scales = scales.index_select(0, rows // self.rows - region.n_start // self.rows)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales.contiguous(), None, layer.spec, phase)

    def _dims(self, stored: int) -> tuple[Dim, ...]:
        """Those of the scales, which are stored in so many dimensions."""
        one = Dim(None, size=1)
        if self.scale_of is ScaleOf.TENSOR:
            return (one,) * min(stored, 2)
        if self.scale_of is ScaleOf.CHANNEL:
            return (Dim("n"), one)[: max(1, stored)]
        blocks = Dim("n", self.rows), Dim("g")
        return (blocks[0], one, blocks[1], one) if stored == 4 else blocks
