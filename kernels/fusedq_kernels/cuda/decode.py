"""Codes to values inside the kernel: one small `@triton.jit` decoder per weight type.

Owns their contract, the table that selects one, and which group and rows a step decodes.
`layouts/tiled.py` owns where each code sits in its word, `gemm.py` the product.

A decoder has the signature

    decode(words, metadata, SUB, STEP, DTYPE, INTERPRET) -> weight

`words` is the int32 tile, `metadata` `[BLOCK_N]` what `metadata.py` makes of one group; STEP is 16,
32, 64 or 128. `weight` holds the unscaled values of columns `[SUB * STEP, SUB * STEP + STEP)` as
DTYPE `[BLOCK_N, STEP]` in natural K order, exact for integers.

`integers.py`, `codebook.py` and `floats.py` have the decoders, `ptx.py` their assembly for NVIDIA
GPUs, and `planes.py` puts values in order by renaming registers, so that the decoded weight never
touches shared memory.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import triton
import triton.language as tl

from fusedq_kernels import geometry
from fusedq_kernels.cuda.codebook import decode_fp4, decode_nf4
from fusedq_kernels.cuda.floats import (
    decode_float4_e2m1f,
    decode_float8_e4m3fn,
    decode_unlifted_float4_e2m1f,
)
from fusedq_kernels.cuda.integers import (
    decode_quarters_uint4b8,
    decode_uint4,
    decode_uint4b8,
    decode_uint8,
    decode_uint8b128,
)
from fusedq_kernels.types import WeightType

BLOCK_K = tl.constexpr(geometry.BLOCK_K)


@triton.constexpr_function
def decoded_rows(step):
    """Rows of K that a decoder yields for a step: 16 at least, a finer one with its neighbours'."""
    return max(step, 16)


@triton.jit
def of_step(mask_k, offs_k, SUB: tl.constexpr, STEP: tl.constexpr):
    """`mask_k` of decoded rows `offs_k`, for those of step SUB alone."""
    PARTS: tl.constexpr = decoded_rows(STEP) // STEP
    if PARTS > 1:
        return mask_k & (offs_k // STEP == SUB % PARTS)
    else:
        return mask_k


DECODERS = {
    WeightType.UINT4: decode_uint4,
    WeightType.UINT4B8: decode_uint4b8,
    WeightType.UINT8: decode_uint8,
    WeightType.UINT8B128: decode_uint8b128,
    WeightType.NF4: decode_nf4,
    WeightType.FP4: decode_fp4,
    WeightType.FLOAT8_E4M3FN: decode_float8_e4m3fn,
    WeightType.FLOAT4_E2M1F: decode_float4_e2m1f,
}
# For weights that their scale lifts: `floats.lifted_scales`.
UNLIFTED = {WeightType.FLOAT4_E2M1F: decode_unlifted_float4_e2m1f}
# For bf16 in steps of 32, where the group's scale makes up for it: bits 4 to 7 of a half lie beyond
# the mantissa, and are lifted to a quarter by one instruction, to the whole by two.
QUARTERS = {WeightType.UINT4B8: decode_quarters_uint4b8}
QUARTERS_STEP = 32
_OWN = dict(DECODERS)


def form(forms: dict[WeightType, object], weight_type: WeightType) -> object | None:
    """The decoder of `forms`; None where there is none, or a measurement has put in another one."""
    return forms.get(weight_type) if DECODERS[weight_type] is _OWN[weight_type] else None
