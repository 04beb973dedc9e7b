"""Codes that are floats of 4 or 8 bits to values inside the kernel, exact in bf16 and fp16.

Owns the decoders of E4M3 in layout P8 and of E2M1 in layout P4. No 8-bit type of Triton's is used:
it converts them from sm_89 on. NVIDIA GPUs run the assembly of `ptx.py`; the interpreter and AMD's
compiler run the same by way of fp32: exponent and mantissa are shifted to where the wider float has
them, and a multiplication makes up for the difference of the exponents' biases, for subnormal
numbers too. NaN becomes a number, so a checkpoint's are refused where it is read.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import torch
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
from fusedq_kernels.cuda.ptx import float_ptx
from fusedq_kernels.encodings import Floats
from fusedq_kernels.types import WeightType

# Constants, because the key of Triton's cache holds the values of no others.
_FLOATS = tl.constexpr(
    {each.value: each.encoding for each in WeightType if isinstance(each.encoding, Floats)}
)
_PTX = tl.constexpr(
    {
        (weight_type, name): float_ptx(floats, dtype)
        for weight_type, floats in _FLOATS.value.items()
        for name, dtype in ((tl.bfloat16.name, torch.bfloat16), (tl.float16.name, torch.float16))
    }
)


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
def _ptx_of(weight_type, dtype):
    return _PTX.value[weight_type, dtype.name]


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
):
    """The number that each code is."""
    if INTERPRET or not has_ptx():
        return portable_floats(words, SUB, STEP, DTYPE, WEIGHT_TYPE)
    else:
        PTX: tl.constexpr = _ptx_of(WEIGHT_TYPE, DTYPE)
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
    return _floats(words, SUB, STEP, DTYPE, INTERPRET, "float8_e4m3fn")


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
    return _floats(words, SUB, STEP, DTYPE, INTERPRET, "float4_e2m1f")
