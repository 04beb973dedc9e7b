"""From fp32 to the dtype of activations, inside the kernels."""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

import triton
import triton.language as tl

from fusedq_kernels.cuda.planes import has_ptx
from fusedq_kernels.cuda.ptx import PTX_DTYPES, product_ptx

_PTX = tl.constexpr({name: product_ptx(dtype) for name, dtype in PTX_DTYPES.items()})


@triton.constexpr_function
def _ptx_of(dtype):
    return _PTX.value[dtype.name]


@triton.jit
def to_output(acc, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Round fp32 to DTYPE, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter truncates; adding half a bf16 ulp first makes it round like a GPU.
        bits = acc.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return acc.to(DTYPE)


@triton.jit
def scaled_by_rows(weight, scale, of_row, INTERPRET: tl.constexpr):
    """`weight * scale` times the row's own scale, in fp32, then rounded to `weight`'s dtype."""
    values = weight.to(tl.float32) * scale[:, None] * of_row[:, None]
    return to_output(values, weight.dtype, INTERPRET)


@triton.jit
def scaled(weight, scale, NARROW_SCALE: tl.constexpr, INTERPRET: tl.constexpr):
    """`weight * scale`, rounded once to the dtype of `weight`; scale in any float dtype.

    NARROW_SCALE says that the scale is a number of that dtype: half the instructions, same bits.
    """
    if NARROW_SCALE and not INTERPRET:
        scale = scale[:, None].to(weight.dtype)
        if has_ptx():
            # Two at a time, which ptxas does not always see by itself.
            PTX: tl.constexpr = _ptx_of(weight.dtype)
            return tl.inline_asm_elementwise(
                PTX, "=r,r,r", [weight, scale], dtype=weight.dtype, is_pure=True, pack=2
            )
        else:
            return weight * scale
    else:
        scale = scale.to(tl.float32)
        return to_output(weight.to(tl.float32) * scale[:, None], weight.dtype, INTERPRET)
