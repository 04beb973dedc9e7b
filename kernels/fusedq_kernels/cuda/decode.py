"""Codes to values inside the kernel: one small `@triton.jit` decoder per weight type.

Owns the arithmetic on a packed `[BLOCK_N, words]` int32 tile and the table that selects it.
`layouts/tiled.py` owns where each code sits in its word, `gemm.py` the product.

A decoder has the signature

    decode(words, metadata, SUB, STEP, DTYPE, INTERPRET) -> weight

`words` is the int32 tile, `metadata` the 4-byte `[BLOCK_N]` row of `PackedWeight.scales` for one
group; STEP is 16, 32, 64 or 128. `weight` holds the unscaled values of columns
`[SUB * STEP, SUB * STEP + STEP)` as DTYPE `[BLOCK_N, STEP]` in natural K order, exact for integers.

Two tricks. A code OR-ed into the mantissa of a power of two whose last mantissa bit is worth one
(bf16 128 = 0x4300, fp16 1024 = 0x6400) is already a float, so no integer-to-float instruction is
spent on it (the "magic number" conversion of FasterTransformer and Marlin). As the mantissa of
bf16 ends at bit 6, bit 7 of a code goes to the exponent of what is subtracted: 128 or 256. And
`planes.py` puts the values in order by renaming registers, so that the decoded weight never touches
shared memory. Codebooks are looked up in `codebook.py`.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

import triton
import triton.language as tl

from fusedq_kernels import geometry
from fusedq_kernels.cuda.codebook import decode_fp4, decode_nf4
from fusedq_kernels.cuda.planes import halves, join_four, join_two, part_of_two
from fusedq_kernels.types import WeightType

BLOCK_K = tl.constexpr(geometry.BLOCK_K)
_PAIR_MASK = tl.constexpr(0x000F000F)
_BYTE_MASK = tl.constexpr(0x00FF00FF)
_LOW_BITS_MASK = tl.constexpr(0x007F007F)
_TOP_BIT_MASK = tl.constexpr(0x00800080)
_BOTH_HALVES = tl.constexpr(0x00010001)
_BF16_BITS = tl.constexpr(0x4300)
_BF16_VALUE = tl.constexpr(128.0)
_FP16_BITS = tl.constexpr(0x6400)
_FP16_VALUE = tl.constexpr(1024.0)
_ZERO_SHIFT = tl.constexpr(16)  # 16 + code - zero_point stays positive up to zero_point 16


@triton.jit
def code_pairs(words, SUB: tl.constexpr, STEP: tl.constexpr):
    """Code pairs (k, k + 1) in the halves of an int32, `[BLOCK_N, STEP // 2]`, k ascending."""
    if STEP == 16:
        return part_of_two((words >> (4 * (SUB // 2))) & _PAIR_MASK, SUB % 2)
    elif STEP == 32:
        return (words >> (4 * SUB)) & _PAIR_MASK
    elif STEP == 64:
        return join_two((words >> (8 * SUB)) & _PAIR_MASK, (words >> (8 * SUB + 4)) & _PAIR_MASK)
    else:
        return join_four(
            words & _PAIR_MASK,
            (words >> 4) & _PAIR_MASK,
            (words >> 8) & _PAIR_MASK,
            (words >> 12) & _PAIR_MASK,
        )


@triton.jit
def _byte_pairs(words, SUB: tl.constexpr, STEP: tl.constexpr):
    """Like `code_pairs`, for P8."""
    if STEP == 16:
        plane = part_of_two((words >> (8 * (SUB // 4))) & _BYTE_MASK, (SUB // 2) % 2)
        return part_of_two(plane, SUB % 2)
    elif STEP == 32:
        return part_of_two((words >> (8 * (SUB // 2))) & _BYTE_MASK, SUB % 2)
    elif STEP == 64:
        return (words >> (8 * SUB)) & _BYTE_MASK
    else:
        return join_two(words & _BYTE_MASK, (words >> 8) & _BYTE_MASK)


@triton.jit
def _minus(values, subtrahend, INTERPRET: tl.constexpr):
    if INTERPRET:
        # The interpreter stores bf16 as uint16 and would subtract those.
        return (values.to(tl.float32) - subtrahend.to(tl.float32)).to(values.dtype)
    else:
        return values - subtrahend


@triton.jit
def _halves_minus(pairs, OFFSET: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """`halves` less OFFSET."""
    values = halves(pairs, DTYPE)
    if INTERPRET:
        return (values.to(tl.float32) - OFFSET).to(DTYPE)
    else:
        return values - OFFSET


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


@triton.jit
def group_of(
    block,
    sub,
    first_step,
    last_group,
    STEPS: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
):
    """The group of step `sub` of a K block; `first_step` is the phase in steps."""
    group = (block * STEPS + sub + first_step) // STEPS_PER_GROUP
    if STEPS > 1:
        # Steps made of padding alone may lie beyond the last group.
        group = tl.minimum(group, last_group)
    return group


@triton.jit
def scale_of(metadata, SCALE_DTYPE: tl.constexpr):
    """fp32 scales `[BLOCK_N]`: metadata itself, or with 16-bit SCALE_DTYPE its high half."""
    if SCALE_DTYPE == tl.float32:
        return metadata
    else:
        return (metadata >> 16).to(tl.int16).to(SCALE_DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _decode_uint4b8(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - 8`."""
    BITS: tl.constexpr = _BF16_BITS if DTYPE == tl.bfloat16 else _FP16_BITS
    OFFSET: tl.constexpr = (_BF16_VALUE if DTYPE == tl.bfloat16 else _FP16_VALUE) + 8
    pairs = code_pairs(words, SUB, STEP) | (BITS * _BOTH_HALVES)
    return _halves_minus(pairs, OFFSET, DTYPE, INTERPRET)


@triton.jit
def _decode_uint4(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - zero_point`; the zero point, 0..16, is the low half of metadata."""
    BITS: tl.constexpr = _BF16_BITS if DTYPE == tl.bfloat16 else _FP16_BITS
    OFFSET: tl.constexpr = (_BF16_VALUE if DTYPE == tl.bfloat16 else _FP16_VALUE) + _ZERO_SHIFT
    zero = metadata & 0xFFFF
    bits = (BITS + _ZERO_SHIFT) * _BOTH_HALVES - zero * _BOTH_HALVES
    pairs = code_pairs(words, SUB, STEP) + bits[:, None]
    return _halves_minus(pairs, OFFSET, DTYPE, INTERPRET)


@triton.jit
def _bytes_minus_128(
    words, SUB: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr
):
    """`code - 128` of P8 words as bf16: 128 + bits 0..6, less 128 where bit 7 is set, else 256."""
    pairs = _byte_pairs(words, SUB, STEP)
    low = (pairs & _LOW_BITS_MASK) | (_BF16_BITS * _BOTH_HALVES)
    top = (pairs & _TOP_BIT_MASK) ^ ((_BF16_BITS + 128) * _BOTH_HALVES)
    return _minus(halves(low, DTYPE), halves(top, DTYPE), INTERPRET)


@triton.jit
def _decode_uint8b128(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - 128`."""
    if DTYPE == tl.bfloat16:
        return _bytes_minus_128(words, SUB, STEP, DTYPE, INTERPRET)
    else:
        OFFSET: tl.constexpr = _FP16_VALUE + 128
        pairs = _byte_pairs(words, SUB, STEP) | (_FP16_BITS * _BOTH_HALVES)
        return _halves_minus(pairs, OFFSET, DTYPE, INTERPRET)


@triton.jit
def _decode_uint8(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`code - zero_point`; the zero point, 0..255, is the low half of metadata."""
    zero = metadata & 0xFFFF
    if DTYPE == tl.bfloat16:
        # Both differences are integers of at most 8 bits and a sign, hence exact in bf16.
        shifted = _bytes_minus_128(words, SUB, STEP, DTYPE, INTERPRET)
        zero = (zero - 128).to(tl.float32).to(DTYPE)
        return _minus(shifted, zero[:, None], INTERPRET)
    else:
        OFFSET: tl.constexpr = _FP16_VALUE + 256
        bits = (_FP16_BITS + 256) * _BOTH_HALVES - zero * _BOTH_HALVES
        pairs = _byte_pairs(words, SUB, STEP) + bits[:, None]
        return _halves_minus(pairs, OFFSET, DTYPE, INTERPRET)


DECODERS = {
    WeightType.UINT4: _decode_uint4,
    WeightType.UINT4B8: _decode_uint4b8,
    WeightType.UINT8: _decode_uint8,
    WeightType.UINT8B128: _decode_uint8b128,
    WeightType.NF4: decode_nf4,
    WeightType.FP4: decode_fp4,
}
