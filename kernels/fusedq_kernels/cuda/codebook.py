"""Codebook codes to values inside the kernel: the 16 entries of NF4 or FP4, by byte permutes.

Owns the lookup in layout PL4; `types.py` owns the codebooks, `decode.py` the contract and the table
of decoders. Entries are rounded to the dtype of the activations, which is what the tensor cores
multiply.

PRMT picks bytes of an 8-byte table by 3-bit selectors, four at a time. Two lookups and a selection
by the codes' top bits give the low bytes of four values, three more the high bytes, and two
permutes interleave them; a table in memory or a tree of selects takes twice to five times as many
instructions. The interpreter runs no assembly and compares instead.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fusedq_kernels.cuda.planes import halves, join_four, join_two, part_of_two, planes_by_asm
from fusedq_kernels.types import WeightType


def table_bits(weight_type: WeightType, dtype: torch.dtype) -> tuple[int, ...]:
    """The codebook rounded to a 16-bit dtype, as 16 unsigned bit patterns."""
    entries = torch.tensor(weight_type.codebook, dtype=torch.float32).to(dtype)
    return tuple(bits & 0xFFFF for bits in entries.view(torch.int16).tolist())


def lookup_asm(table: Sequence[int]) -> str:
    """PTX that turns a PL4 word `$4` into plane j in `$j`: `table[nibble 2j + b]` in half b.

    `table` has 16 entries of 16 bits. Every input is read before an output is written.
    """
    lines = [".reg .b32 " + ", ".join([f"l{i}, h{i}" for i in range(4)] + [_TEMPORARIES])]
    for i in range(4):
        entries = table[4 * i : 4 * i + 4]
        low = sum((entry & 0xFF) << (8 * j) for j, entry in enumerate(entries))
        high = sum((entry >> 8) << (8 * j) for j, entry in enumerate(entries))
        lines += [f"mov.b32 l{i}, 0x{low:08X}", f"mov.b32 h{i}, 0x{high:08X}"]
    lines += [
        # Selectors of three bits, and the top bit of each code choosing byte i or i + 4.
        "and.b32 s0, $4, 0x77777777",
        "shr.b32 t0, $4, 1",
        "lop3.b32 t0, t0, 0x44444444, 0x32103210, 0xEA",
        "shr.b32 s1, s0, 16",
        "shr.b32 t1, t0, 16",
    ]
    for half in range(2):
        for byte in "lh":
            lines += [
                f"prmt.b32 a, {byte}0, {byte}1, s{half}",
                f"prmt.b32 b, {byte}2, {byte}3, s{half}",
                f"prmt.b32 {byte}, a, b, t{half}",
            ]
        lines += [
            f"prmt.b32 ${2 * half}, l, h, 0x5140",
            f"prmt.b32 ${2 * half + 1}, l, h, 0x7362",
        ]
    return "{ " + " ".join(f"{line};" for line in lines) + " }"


_TEMPORARIES = "s0, s1, t0, t1, a, b, l, h"
# Constants, because the key of Triton's cache holds the values of no others.
_TABLES = tl.constexpr(
    {
        (weight_type.value, name): table_bits(weight_type, dtype)
        for weight_type in WeightType
        if weight_type.codebook is not None
        for name, dtype in ((tl.bfloat16.name, torch.bfloat16), (tl.float16.name, torch.float16))
    }
)
_ASM = tl.constexpr({key: lookup_asm(table) for key, table in _TABLES.value.items()})


@triton.constexpr_function
def _table_of(codebook, dtype):
    return _TABLES.value[codebook, dtype.name]


@triton.constexpr_function
def _asm_of(codebook, dtype):
    return _ASM.value[codebook, dtype.name]


@triton.jit
def _compare(
    words, PLANE: tl.constexpr, SUB: tl.constexpr, STEP: tl.constexpr, TABLE: tl.constexpr
):
    """Plane PLANE by comparing each code with all 16, for the interpreter.

    That takes long, so a plane of which columns `[SUB * STEP, SUB * STEP + STEP)` see nothing stays
    zero.
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
def _of_four(first, second, third, fourth, INDEX: tl.constexpr):
    if INDEX < 2:
        return first if INDEX == 0 else second
    else:
        return third if INDEX == 2 else fourth


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
    if INTERPRET:
        TABLE: tl.constexpr = _table_of(CODEBOOK, DTYPE)
        first = _compare(words, 0, SUB, STEP, TABLE)
        second = _compare(words, 1, SUB, STEP, TABLE)
        third = _compare(words, 2, SUB, STEP, TABLE)
        fourth = _compare(words, 3, SUB, STEP, TABLE)
    else:
        first, second, third, fourth = planes_by_asm(words, _asm_of(CODEBOOK, DTYPE))
    if STEP == 16:
        return halves(part_of_two(_of_four(first, second, third, fourth, SUB // 2), SUB % 2), DTYPE)
    elif STEP == 32:
        return halves(_of_four(first, second, third, fourth, SUB), DTYPE)
    elif STEP == 64:
        if SUB == 0:
            return halves(join_two(first, second), DTYPE)
        else:
            return halves(join_two(third, fourth), DTYPE)
    else:
        return halves(join_four(first, second, third, fourth), DTYPE)


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
