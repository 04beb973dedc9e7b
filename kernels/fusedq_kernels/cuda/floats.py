"""Codes that are 8-bit floats to values inside the kernel, exact in bf16 and fp16.

Owns the decoder of E4M3 in layout P8. No 8-bit type of Triton's is used: it converts them from
sm_89 on. NVIDIA GPUs run the assembly of `ptx.py`; the interpreter and AMD's compiler run the same
by way of fp32: exponent and mantissa are shifted to where the wider float has them, and a
multiplication makes up for the difference of the exponents' biases, for subnormal numbers too. NaN
becomes a number, so a checkpoint's are refused where it is read.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import torch
import triton
import triton.language as tl

from fusedq_kernels.cuda.integers import code_pairs
from fusedq_kernels.cuda.planes import columns_of_two, halves, has_ptx, two_planes_by_asm
from fusedq_kernels.cuda.ptx import float8_ptx
from fusedq_kernels.types import WeightType

# Constants, because the key of Triton's cache holds the values of no others.
_LIFT = tl.constexpr(2.0**120)
_PTX = tl.constexpr(
    {
        name: float8_ptx(WeightType.FLOAT8_E4M3FN.encoding, dtype)
        for name, dtype in ((tl.bfloat16.name, torch.bfloat16), (tl.float16.name, torch.float16))
    }
)


@triton.constexpr_function
def _ptx_of(dtype):
    return _PTX.value[dtype.name]


@triton.jit
def portable_e4m3(words, SUB: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers without assembly."""
    codes = halves(code_pairs(words, SUB, STEP, 8), tl.int16).to(tl.int32)
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24)
    return (bits.to(tl.float32, bitcast=True) * _LIFT).to(DTYPE)


@triton.jit
def decode_float8_e4m3fn(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The number that each code is."""
    if INTERPRET or not has_ptx():
        return portable_e4m3(words, SUB, STEP, DTYPE)
    else:
        first, second = two_planes_by_asm((words,), _ptx_of(DTYPE))
        return halves(columns_of_two(first, second, SUB, STEP), DTYPE)
