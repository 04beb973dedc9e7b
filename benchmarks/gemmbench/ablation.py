"""What dequantization costs inside the fused kernel: the same kernel without it, and with it twice.

The kernel takes its decoder as a parameter, so a variant is another decoder: one that hands the
packed words to the tensor cores as they are, one that decodes every word a second time. Both give
wrong answers by design; only their times mean something.
"""

import triton
import triton.language as tl

from fusedq_kernels.cuda.decode import DECODERS
from fusedq_kernels.types import WeightType
from gemmbench.variants import Variant
from vllm_fusedq.measure.undecoded_triton import words_as_values

_DECODE_UINT4B8 = DECODERS[WeightType.UINT4B8]
_DECODE_UINT8B128 = DECODERS[WeightType.UINT8B128]
_DECODE_NF4 = DECODERS[WeightType.NF4]


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
WITHOUT = dict.fromkeys(TWICE, words_as_values)

ABLATIONS = tuple(
    Variant(name, decoders=tuple(decoders.items()), decodes=False)
    for name, decoders in (("without-dequant", WITHOUT), ("dequant-twice", TWICE))
)
