"""triton-gemm with another decoder, and one that decodes nothing: for measurements alone."""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

from collections.abc import Iterator
from contextlib import contextmanager

import triton
import triton.language as tl

from fusedq_kernels.cuda.decode import DECODERS
from fusedq_kernels.cuda.planes import columns_of_four, columns_of_two, halves
from fusedq_kernels.types import WeightType


@triton.jit
def words_as_values(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """As many values as a decoder returns, without a decoding instruction."""
    if words.shape[1] == 16:
        return halves(columns_of_four(words, words, words, words, SUB, STEP), DTYPE)
    else:
        return halves(columns_of_two(words, words, SUB, STEP), DTYPE)


@contextmanager
def decoding(decoders: dict[WeightType, object]) -> Iterator[None]:
    """What is prepared meanwhile has other decoders."""
    real = {weight_type: DECODERS[weight_type] for weight_type in decoders}
    DECODERS.update(decoders)
    try:
        yield
    finally:
        DECODERS.update(real)
