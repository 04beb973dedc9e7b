"""From planes of packed pairs to a tile in natural K order, without an instruction.

A plane is int32 `[BLOCK_N, W]`: the values of rows 2w and 2w + 1 of the plane in the halves of word
w. The joins, permutes and reshapes here only rename registers: Triton carries the layout of the dot
operand back through them to the packed load. The decoders build on this.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import triton
import triton.language as tl


@triton.jit
def join_two(first, second):
    """Words of both planes, one after the other: `[BLOCK_N, 2 W]`."""
    planes = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(planes, (first.shape[0], 2 * first.shape[1]))


@triton.jit
def join_four(first, second, third, fourth):
    """Words of the four planes, one after the other: `[BLOCK_N, 4 W]`."""
    planes = tl.join(tl.join(first, third), tl.join(second, fourth))
    planes = tl.permute(planes, (0, 2, 3, 1))
    return tl.reshape(planes, (first.shape[0], 4 * first.shape[1]))


@triton.language.core.builtin
def has_ptx(_semantic=None):
    """Whether the compiler targets NVIDIA GPUs, ahead of time too; not for the interpreter."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.constexpr_function
def _constraints(outputs, inputs):
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.jit
def two_planes_by_asm(operands, ASM: tl.constexpr):
    """Like `four_planes_by_asm`, `$0` and `$1` of `$2` on."""
    return tl.inline_asm_elementwise(
        ASM,
        _constraints(2, len(operands)),
        operands,
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def four_planes_by_asm(operands, ASM: tl.constexpr):
    """The four planes that PTX makes of int32 operands that broadcast: `$0` to `$3` of `$4` on.

    It reads them for the last time before it writes the first plane. Calls on the same operands are
    emitted once.
    """
    return tl.inline_asm_elementwise(
        ASM,
        _constraints(4, len(operands)),
        operands,
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def part_of_two(plane, INDEX: tl.constexpr):
    """The first or the second half of a plane's words: `[BLOCK_N, W / 2]`."""
    parts = tl.reshape(plane, (plane.shape[0], 2, plane.shape[1] // 2))
    first, second = tl.split(tl.permute(parts, (0, 2, 1)))
    if INDEX == 0:
        return first
    else:
        return second


@triton.jit
def _of_four(first, second, third, fourth, INDEX: tl.constexpr):
    if INDEX < 2:
        return first if INDEX == 0 else second
    else:
        return third if INDEX == 2 else fourth


@triton.jit
def columns_of_four(first, second, third, fourth, SUB: tl.constexpr, STEP: tl.constexpr):
    """Words of columns `[SUB * STEP, SUB * STEP + STEP)` of four planes of 32 columns."""
    if STEP == 16:
        return part_of_two(_of_four(first, second, third, fourth, SUB // 2), SUB % 2)
    elif STEP == 32:
        return _of_four(first, second, third, fourth, SUB)
    elif STEP == 64:
        return join_two(first, second) if SUB == 0 else join_two(third, fourth)
    else:
        return join_four(first, second, third, fourth)


@triton.jit
def columns_of_two(first, second, SUB: tl.constexpr, STEP: tl.constexpr):
    """Like `columns_of_four`, of two planes of 64 columns."""
    if STEP == 128:
        return join_two(first, second)
    else:
        plane = first if SUB * STEP < 64 else second
        if STEP == 64:
            return plane
        elif STEP == 32:
            return part_of_two(plane, SUB % 2)
        else:
            return part_of_two(part_of_two(plane, SUB // 2 % 2), SUB % 2)


@triton.jit
def halves(pairs, DTYPE: tl.constexpr):
    """Both halves of each int32 reinterpreted as DTYPE: `[BLOCK_N, 2 W]`."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], 2 * pairs.shape[1]))
