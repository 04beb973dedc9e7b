"""What dequantization costs inside the fused kernel: the same kernel without it, and with it twice.

The kernel takes its decoder as a parameter, so a variant is another decoder: one that hands the
packed words to the tensor cores as they are, one that decodes every word a second time. Both give
wrong answers by design; only their times mean something.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505, SIM300

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusedq_kernels import gemm, layout_for, pack, weight_bytes
from fusedq_kernels.decode import DECODERS
from fusedq_kernels.heuristics import select
from fusedq_kernels.planes import halves, join_four, join_two
from fusedq_kernels.types import GemmShape, KernelName, LogicalWeight, WeightType
from gemmbench.contender import Prepared, Unavailable, fused_dram_bytes
from gemmbench.own import device_spec

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


# One wrapper per decoder, because a Triton function can only call what it finds as a global. The
# changed bits and the sum keep the compiler from seeing that the second result is not needed.
@triton.jit
def _uint4b8_twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    once = _DECODE_UINT4B8(words, metadata, SUB, STEP, DTYPE, INTERPRET)
    flipped = words ^ 0x11111111
    again = _DECODE_UINT4B8(flipped, metadata, SUB, STEP, DTYPE, INTERPRET)
    return once + again


@triton.jit
def _uint8b128_twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    once = _DECODE_UINT8B128(words, metadata, SUB, STEP, DTYPE, INTERPRET)
    flipped = words ^ 0x11111111
    again = _DECODE_UINT8B128(flipped, metadata, SUB, STEP, DTYPE, INTERPRET)
    return once + again


@triton.jit
def _nf4_twice(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    once = _DECODE_NF4(words, metadata, SUB, STEP, DTYPE, INTERPRET)
    flipped = words ^ 0x11111111
    again = _DECODE_NF4(flipped, metadata, SUB, STEP, DTYPE, INTERPRET)
    return once + again


_TWICE = {
    WeightType.UINT4B8: _uint4b8_twice,
    WeightType.UINT8B128: _uint8b128_twice,
    WeightType.NF4: _nf4_twice,
}
_WITHOUT = dict.fromkeys(_TWICE, _words_as_values)


@dataclass(frozen=True)
class Ablated:
    """The fused kernel with another decoder, at the tile that the real one gets."""

    name: str
    decoders: dict

    def version(self) -> str:
        return f"triton {triton.__version__}"

    def prepare(self, logical: LogicalWeight, act_dtype: torch.dtype) -> Prepared:
        weight_type = logical.spec.weight_type
        if weight_type not in self.decoders:
            raise Unavailable(f"no variant for {weight_type.value}")
        kernel = KernelName.TRITON_GEMM
        packed = pack(logical, layout_for(kernel, weight_type), act_dtype)
        n, k = logical.codes.shape
        device = device_spec(logical.codes.device)
        size = sum(weight_bytes(packed).values())

        def run(x: torch.Tensor) -> torch.Tensor:
            launch = select(GemmShape(x.shape[0], n, k), logical.spec, device)
            with _decoder(weight_type, self.decoders[weight_type]):
                return gemm.fused_gemm(x, packed, None, launch)

        return Prepared(
            run, size, fused_dram_bytes(size, n, k), lambda m: "wrong by design", checked=False
        )


@contextmanager
def _decoder(weight_type: WeightType, decoder: object) -> Iterator[None]:
    real = DECODERS[weight_type]
    DECODERS[weight_type] = decoder
    try:
        yield
    finally:
        DECODERS[weight_type] = real


ABLATIONS = (Ablated("without-dequant", _WITHOUT), Ablated("dequant-twice", _TWICE))
