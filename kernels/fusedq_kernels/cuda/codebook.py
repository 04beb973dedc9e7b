"""Codebook codes to values inside the kernel: the 16 entries of NF4 or FP4.

Owns the lookup in layout PL4; `types.py` owns the codebooks, `decode.py` the contract and the table
of decoders. Entries are rounded to the dtype of the activations, which is what the tensor cores
multiply.

`ptx.py` has the lookup, by byte permutes: a table in memory or a tree of selects takes twice to
five times as many instructions. The interpreter and AMD GPUs know no PTX and compare instead.
"""

import torch
import triton
import triton.language as tl

from fusedq_kernels.cuda.planes import columns_of_four, four_planes_by_asm, halves, has_ptx
from fusedq_kernels.cuda.ptx import PTX_DTYPES, bit_pattern, lookup_ptx
from fusedq_kernels.encodings import Codebook
from fusedq_kernels.types import WeightType


def table_bits(weight_type: WeightType, dtype: torch.dtype) -> tuple[int, ...]:
    """The codebook rounded to a 16-bit dtype, as 16 unsigned bit patterns."""
    return tuple(bit_pattern(entry, dtype) for entry in weight_type.codebook)


# Constants, because the key of Triton's cache holds the values of no others.
_TABLES = tl.constexpr(
    {
        (weight_type.value, name): table_bits(weight_type, dtype)
        for weight_type in WeightType
        if isinstance(weight_type.encoding, Codebook)
        for name, dtype in PTX_DTYPES.items()
    }
)
_PTX = tl.constexpr({key: lookup_ptx(table) for key, table in _TABLES.value.items()})


@triton.constexpr_function
def _table_of(codebook, dtype):
    return _TABLES.value[codebook, dtype.name]


@triton.constexpr_function
def _ptx_of(codebook, dtype):
    return _PTX.value[codebook, dtype.name]


@triton.jit
def _compare(
    words, PLANE: tl.constexpr, SUB: tl.constexpr, STEP: tl.constexpr, TABLE: tl.constexpr
):
    """Plane PLANE by comparing each code with all 16, without PTX.

    In the interpreter that takes long, so a plane of which columns `[SUB * STEP, SUB * STEP +
    STEP)` see nothing stays zero.
    """
    codes = words >> (8 * PLANE)
    low = tl.zeros_like(words)
    high = tl.zeros_like(words)
    if 32 * PLANE < (SUB + 1) * STEP and SUB * STEP < 32 * (PLANE + 1):
        for code in tl.static_range(16):
            low = tl.where(codes & 15 == code, TABLE[code], low)
            high = tl.where((codes >> 4) & 15 == code, TABLE[code], high)
    return low | (high << 16)


@triton.jit
def _lookup(
    words,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
    CODEBOOK: tl.constexpr,
):
    """Values of columns `[SUB * STEP, SUB * STEP + STEP)` as DTYPE `[BLOCK_N, STEP]`."""
    if INTERPRET or not has_ptx():
        TABLE: tl.constexpr = _table_of(CODEBOOK, DTYPE)
        first = _compare(words, 0, SUB, STEP, TABLE)
        second = _compare(words, 1, SUB, STEP, TABLE)
        third = _compare(words, 2, SUB, STEP, TABLE)
        fourth = _compare(words, 3, SUB, STEP, TABLE)
    else:
        first, second, third, fourth = four_planes_by_asm((words,), _ptx_of(CODEBOOK, DTYPE))
    return halves(columns_of_four(first, second, third, fourth, SUB, STEP), DTYPE)


@triton.jit
def decode_nf4(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The NF4 entry of each code."""
    return _lookup(words, SUB, STEP, DTYPE, INTERPRET, "nf4")


@triton.jit
def decode_fp4(
    words,
    metadata,
    SUB: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The FP4 entry of each code."""
    return _lookup(words, SUB, STEP, DTYPE, INTERPRET, "fp4")
