"""Codes that are floats of 4 or 8 bits to values inside the kernel, exact in bf16 and fp16.

Owns the decoders of E4M3 in layout P8 and of E2M1 in layout P4. No 8-bit type of Triton's is used:
it converts them from sm_89 on. NVIDIA GPUs run the assembly of `ptx.py`; the interpreter and AMD's
compiler run the same by way of fp32: exponent and mantissa are shifted to where the wider float has
them, and a multiplication makes up for the difference of the exponents' biases, for subnormal
numbers too. NaN becomes a number, so a checkpoint's are refused where it is read.

Where the weight is multiplied by a scale of E4M3 anyway, that scale takes the other factor along,
once for many weights: `decode_unlifted_float4_e2m1f` and `lifted_scales`. Their products are
2**-HEADROOM of the weight's values, as the largest scale would leave the range of the dtype else.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import triton
import triton.language as tl

from fusedq_kernels.cuda.integers import code_pairs
from fusedq_kernels.cuda.planes import (
    columns_of_four,
    columns_of_two,
    four_planes_by_asm,
    halves,
    has_ptx,
    two_planes_by_asm,
)
from fusedq_kernels.cuda.ptx import PTX_DTYPES, float_ptx, missing_lift, scale_ptx
from fusedq_kernels.cuda.rounding import to_output
from fusedq_kernels.encodings import Floats
from fusedq_kernels.types import WeightType

# Constants, because the key of Triton's cache holds the values of no others.
_FLOATS = tl.constexpr(
    {each.value: each.encoding for each in WeightType if isinstance(each.encoding, Floats)}
)
_PTX = tl.constexpr(
    {
        (weight_type, name, lifted): float_ptx(floats, dtype, lifted)
        for weight_type, floats in _FLOATS.value.items()
        for name, dtype in PTX_DTYPES.items()
        for lifted in (True, False)
    }
)
_E2M1 = WeightType.FLOAT4_E2M1F.encoding
# E4M3 ends below 2**9, a dtype of exponent bias b below 2**(b + 1), and b - 1 doublings lack.
HEADROOM = 7
_SCALE_PTX = tl.constexpr(
    {
        name: scale_ptx(missing_lift(_E2M1, dtype) - HEADROOM, dtype)
        for name, dtype in PTX_DTYPES.items()
    }
)
_UNDER_HEADROOM = tl.constexpr(2.0**-HEADROOM)


@triton.constexpr_function
def _bits_of(weight_type):
    return _FLOATS.value[weight_type].bits


@triton.constexpr_function
def _size_shift(weight_type):
    return 23 - _FLOATS.value[weight_type].mantissa


@triton.constexpr_function
def _lift_of(weight_type):
    return 2.0 ** (128 - (1 << (_FLOATS.value[weight_type].exponent - 1)))


@triton.constexpr_function
def _ptx_of(weight_type, dtype, lifted):
    return _PTX.value[weight_type, dtype.name, lifted]


@triton.constexpr_function
def _scale_ptx_of(dtype):
    return _SCALE_PTX.value[dtype.name]


@triton.jit
def portable_floats(
    words, SUB: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr, WEIGHT_TYPE: tl.constexpr
):
    """The numbers without assembly."""
    BITS: tl.constexpr = _bits_of(WEIGHT_TYPE)
    SIGN: tl.constexpr = 1 << (BITS - 1)
    codes = halves(code_pairs(words, SUB, STEP, BITS), tl.int16).to(tl.int32)
    bits = ((codes & (SIGN - 1)) << _size_shift(WEIGHT_TYPE)) | ((codes & SIGN) << (32 - BITS))
    return (bits.to(tl.float32, bitcast=True) * _lift_of(WEIGHT_TYPE)).to(DTYPE)


@triton.jit
def _floats(
    words,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    LIFTED: tl.constexpr,
):
    """The number that each code is."""
    if INTERPRET or not has_ptx():
        return portable_floats(words, SUB, STEP, DTYPE, WEIGHT_TYPE)
    else:
        PTX: tl.constexpr = _ptx_of(WEIGHT_TYPE, DTYPE, LIFTED)
        if _bits_of(WEIGHT_TYPE) == 4:
            first, second, third, fourth = four_planes_by_asm((words,), PTX)
            pairs = columns_of_four(first, second, third, fourth, SUB, STEP)
        else:
            first, second = two_planes_by_asm((words,), PTX)
            pairs = columns_of_two(first, second, SUB, STEP)
        return halves(pairs, DTYPE)


@triton.jit
def decode_float8_e4m3fn(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """E4M3."""
    return _floats(words, SUB, STEP, DTYPE, INTERPRET, "float8_e4m3fn", True)


@triton.jit
def decode_float4_e2m1f(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """E2M1."""
    return _floats(words, SUB, STEP, DTYPE, INTERPRET, "float4_e2m1f", True)


@triton.jit
def decode_unlifted_float4_e2m1f(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """E2M1, for scales that are `lifted_scales`."""
    return _floats(words, SUB, STEP, DTYPE, INTERPRET, "float4_e2m1f", False)


@triton.jit
def lifted_scales(words, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Pairs of bf16 scales, numbers of E4M3, as pairs of DTYPE that lift unlifted weights.

    Without assembly weights are lifted already: the scales give way to HEADROOM alone.
    """
    if INTERPRET or not has_ptx():
        low = (words << 16).to(tl.float32, bitcast=True) * _UNDER_HEADROOM
        high = (words & -65536).to(tl.float32, bitcast=True) * _UNDER_HEADROOM
        low = to_output(low, DTYPE, INTERPRET).to(tl.int16, bitcast=True).to(tl.int32)
        high = to_output(high, DTYPE, INTERPRET).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)
    else:
        return tl.inline_asm_elementwise(
            _scale_ptx_of(DTYPE), "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        )
