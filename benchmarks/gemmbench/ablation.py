"""What dequantization costs inside the fused kernel: the same kernel without it, and with it twice.

The kernel takes its decoder as a parameter, so a variant is another decoder: one that hands the
packed words to the tensor cores as they are, one that decodes every word a second time. Both give
wrong answers by design; only their times mean something.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

import triton
import triton.language as tl

from fusedq_kernels.cuda.decode import DECODERS
from fusedq_kernels.cuda.planes import halves, join_four, join_two
from fusedq_kernels.types import WeightType
from gemmbench.variants import Variant

_DECODE_UINT4B8 = DECODERS[WeightType.UINT4B8]
_DECODE_UINT8B128 = DECODERS[WeightType.UINT8B128]
_DECODE_NF4 = DECODERS[WeightType.NF4]


@triton.jit
def _words_as_values(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """As many values as a decoder returns, without a decoding instruction."""
    if STEP == 8 * words.shape[1]:
        return halves(join_four(words, words, words, words), DTYPE)
    elif STEP == 4 * words.shape[1]:
        return halves(join_two(words, words), DTYPE)
    else:
        return halves(words, DTYPE)


@triton.jit
def _twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
    DECODE: tl.constexpr,
):
    """The changed bits and the sum keep the compiler from dropping the second result."""
    once = DECODE(words, metadata, SUB, STEP, DTYPE, INTERPRET)
    flipped = words ^ 0x11111111
    again = DECODE(flipped, metadata, SUB, STEP, DTYPE, INTERPRET)
    return once + again


# One per decoder, because the kernel hands its decoder the arguments of all decoders and no other.
@triton.jit
def _uint4b8_twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    return _twice(words, metadata, SUB, STEP, DTYPE, INTERPRET, _DECODE_UINT4B8)


@triton.jit
def _uint8b128_twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    return _twice(words, metadata, SUB, STEP, DTYPE, INTERPRET, _DECODE_UINT8B128)


@triton.jit
def _nf4_twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    return _twice(words, metadata, SUB, STEP, DTYPE, INTERPRET, _DECODE_NF4)


TWICE = {
    WeightType.UINT4B8: _uint4b8_twice,
    WeightType.UINT8B128: _uint8b128_twice,
    WeightType.NF4: _nf4_twice,
}
WITHOUT = dict.fromkeys(TWICE, _words_as_values)

ABLATIONS = tuple(
    Variant(name, decoders=tuple(decoders.items()), decodes=False)
    for name, decoders in (("without-dequant", WITHOUT), ("dequant-twice", TWICE))
)
