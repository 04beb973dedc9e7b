"""Integer codes to values inside the kernel: `code - zero_point`, exact in bf16 and fp16.

Owns the decoders of layouts P4 and P8. NVIDIA GPUs run the assembly of `ptx.py`; the interpreter
and AMD's compiler run the same in Triton: the code is added to the magic number, less the zero
point, and that number is subtracted again. As the mantissa of bf16 ends at bit 6, bit 7 of a code
goes to the exponent of what is subtracted: 128 or 256.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

import triton
import triton.language as tl

from fusedq_kernels.cuda.planes import (
    columns_of_four,
    columns_of_two,
    four_planes_by_asm,
    halves,
    has_ptx,
    two_planes_by_asm,
)
from fusedq_kernels.cuda.ptx import PTX_DTYPES, integer_ptx
from fusedq_kernels.encodings import STORED, Codes
from fusedq_kernels.types import WeightType

_PAIR_MASK = tl.constexpr(0x000F000F)
_BYTE_MASK = tl.constexpr(0x00FF00FF)
_LOW_BITS_MASK = tl.constexpr(0x007F007F)
_TOP_BIT_MASK = tl.constexpr(0x00800080)
_BOTH_HALVES = tl.constexpr(0x00010001)
_BF16_BITS = tl.constexpr(0x4300)
_BF16_VALUE = tl.constexpr(128.0)
_FP16_BITS = tl.constexpr(0x6400)
_FP16_VALUE = tl.constexpr(1024.0)
# Constants, because the key of Triton's cache holds the values of no others.
_INTEGERS = tl.constexpr(
    {each.value: each.encoding for each in WeightType if isinstance(each.encoding, Codes)}
)
_PTX = tl.constexpr(
    {
        (weight_type, name, quarters): integer_ptx(codes, dtype, quarters)
        for weight_type, codes in _INTEGERS.value.items()
        for name, dtype in PTX_DTYPES.items()
        for quarters in ((False, True) if codes.zero is not STORED else (False,))
    }
)


@triton.constexpr_function
def _bits_of(weight_type):
    return _INTEGERS.value[weight_type].bits


@triton.constexpr_function
def _stores_zeros(weight_type):
    return _INTEGERS.value[weight_type].zero is STORED


@triton.constexpr_function
def _zero_of(weight_type):
    return _INTEGERS.value[weight_type].zero


@triton.constexpr_function
def _ptx_of(weight_type, dtype, quarters):
    return _PTX.value[weight_type, dtype.name, quarters]


@triton.jit
def code_pairs(words, SUB: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """Code pairs (k, k + 1) in the halves of an int32, `[BLOCK_N, STEP // 2]`, k ascending."""
    if BITS == 4:
        return columns_of_four(
            words & _PAIR_MASK,
            (words >> 4) & _PAIR_MASK,
            (words >> 8) & _PAIR_MASK,
            (words >> 12) & _PAIR_MASK,
            SUB,
            STEP,
        )
    else:
        return columns_of_two(words & _BYTE_MASK, (words >> 8) & _BYTE_MASK, SUB, STEP)


@triton.jit
def _minus(values, subtrahend, INTERPRET: tl.constexpr):
    if INTERPRET:
        # The interpreter stores bf16 as uint16 and would subtract those.
        return (values.to(tl.float32) - subtrahend.to(tl.float32)).to(values.dtype)
    else:
        return values - subtrahend.to(values.dtype)


@triton.jit
def portable_integers(
    words,
    zero,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BITS: tl.constexpr,
):
    """`code - zero` without assembly; `zero` is int32, `[BLOCK_N]` or `[1]`."""
    pairs = code_pairs(words, SUB, STEP, BITS)
    if BITS == 8 and DTYPE == tl.bfloat16:
        low = (pairs & _LOW_BITS_MASK) | (_BF16_BITS * _BOTH_HALVES)
        top = (pairs & _TOP_BIT_MASK) ^ ((_BF16_BITS + 128) * _BOTH_HALVES)
        # Both differences are integers of at most 8 bits and a sign, hence exact in bf16.
        shifted = _minus(halves(low, DTYPE), halves(top, DTYPE), INTERPRET)
        return _minus(shifted, (zero - 128)[:, None], INTERPRET)
    else:
        # ABOVE + code - zero stays positive: zero points go up to 16, or to 255.
        ABOVE: tl.constexpr = 16 if BITS == 4 else 256
        MAGIC: tl.constexpr = _BF16_BITS if DTYPE == tl.bfloat16 else _FP16_BITS
        VALUE: tl.constexpr = _BF16_VALUE if DTYPE == tl.bfloat16 else _FP16_VALUE
        bits = (MAGIC + ABOVE) * _BOTH_HALVES - zero * _BOTH_HALVES
        values = halves(pairs + bits[:, None], DTYPE)
        return _minus(values, tl.full((1, 1), VALUE + ABOVE, tl.float32), INTERPRET)


@triton.jit
def _integers(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    QUARTERS: tl.constexpr,
):
    """Values of columns `[SUB * STEP, SUB * STEP + STEP)` as DTYPE `[BLOCK_N, STEP]`.

    With QUARTERS, of 4 bits for bf16 in steps of 32, a quarter of them where SUB is odd.
    """
    BITS: tl.constexpr = _bits_of(WEIGHT_TYPE)
    STORES_ZEROS: tl.constexpr = _stores_zeros(WEIGHT_TYPE)
    if INTERPRET or not has_ptx():
        zero = metadata & 0xFFFF if STORES_ZEROS else tl.full((1,), _zero_of(WEIGHT_TYPE), tl.int32)
        values = portable_integers(words, zero, SUB, STEP, DTYPE, INTERPRET, BITS)
        if QUARTERS and SUB % 2 == 1:
            return (values.to(tl.float32) * 0.25).to(DTYPE)
        else:
            return values
    else:
        PTX: tl.constexpr = _ptx_of(WEIGHT_TYPE, DTYPE, QUARTERS)
        operands = (words, metadata[:, None]) if STORES_ZEROS else (words,)
        if BITS == 4:
            first, second, third, fourth = four_planes_by_asm(operands, PTX)
            pairs = columns_of_four(first, second, third, fourth, SUB, STEP)
        else:
            first, second = two_planes_by_asm(operands, PTX)
            pairs = columns_of_two(first, second, SUB, STEP)
        return halves(pairs, DTYPE)


@triton.jit
def decode_uint4(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - zero_point`; the zero point, 0..16, is the low half of metadata."""
    return _integers(words, metadata, SUB, STEP, DTYPE, INTERPRET, "uint4", False)


@triton.jit
def decode_uint4b8(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - 8`."""
    return _integers(words, metadata, SUB, STEP, DTYPE, INTERPRET, "uint4b8", False)


@triton.jit
def decode_quarters_uint4b8(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`decode_uint4b8` of bf16 in steps of 32, a quarter of it where SUB is odd."""
    return _integers(words, metadata, SUB, STEP, DTYPE, INTERPRET, "uint4b8", True)


@triton.jit
def decode_uint8(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - zero_point`; the zero point, 0..255, is the low half of metadata."""
    return _integers(words, metadata, SUB, STEP, DTYPE, INTERPRET, "uint8", False)


@triton.jit
def decode_uint8b128(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - 128`."""
    return _integers(words, metadata, SUB, STEP, DTYPE, INTERPRET, "uint8b128", False)
