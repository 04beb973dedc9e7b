"""Runs the fused kernel on problems surrounded by NaN, in Triton's interpreter or on a GPU."""

from dataclasses import replace

import torch

from fusedq_kernels import ops
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import TILED_LAYOUTS, Launch, PackedWeight, TileConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launch(block_m=16, block_n=64, split_k=1, **options) -> Launch:
    tile = TileConfig(block_m, block_n, split_k, num_warps=4, num_stages=2, **options)
    return Launch("triton-gemm", tile, "test")


def pack(logical, act_dtype) -> PackedWeight:
    """With NaN scales (in any dtype) behind the last group: steps of padding must not read them."""
    target = TILED_LAYOUTS[logical.spec.weight_type]
    packed = packing.pack(logical, target, act_dtype)
    behind = torch.full((4, *packed.scales.shape[1:]), -1, dtype=torch.int32)
    scales = torch.cat([packed.scales, behind.view(packed.scales.dtype)])
    scales = scales.to(DEVICE)[: len(packed.scales)]
    return replace(packed, qweight=packed.qweight.to(DEVICE), scales=scales)


def surrounded_by_nan(x) -> torch.Tensor:
    """The same tokens as a view whose neighbours on all sides are NaN."""
    m, k = x.shape
    wide = torch.full((m + 2, k + 32), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[1:-1, 16 : 16 + k] = x
    return wide[1:-1, 16 : 16 + k]


def run(x, packed, bias, chosen) -> torch.Tensor:
    bias = None if bias is None else bias.to(DEVICE)
    return ops.run(surrounded_by_nan(x), packed, bias, chosen).cpu()
