"""What stands between the two products of an expert, in fp32, on the sums of the first one.

`activation.py` has the functions and what LIMIT, ALPHA and BETA mean. Rows of gate and up alternate
by 8 in the weight (gate 0-7, up 0-7, gate 8-15, ..): the sums of mma and wgmma lie so that rows r
and r + 8 of 16 belong to one thread, which therefore holds a pair already, and halving the tile
only renames registers.
"""

# Triton drops the other branch of a constexpr `if` only where it stands in an `else`.
# ruff: noqa: RET505

import triton
import triton.language as tl

from fusedq_kernels.activation import Activation

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_MINUS_TWICE_SQRT_2_OVER_PI = tl.constexpr(-1.5957691216057308)


@triton.constexpr_function
def values_per_output(name):
    """How many rows of the weight make one output: 2 of a gated activation."""
    return 2 if name is not None and Activation(name, limit=0.0).is_gated else 1


@triton.jit
def _silu(x, ALPHA: tl.constexpr):
    return x / (1.0 + tl.exp(-ALPHA * x))


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _at_most(x, limit):
    """`min(x, limit)`, and NaN where x is."""
    return tl.where(x > limit, limit, x)


@triton.jit
def _within(x, LIMIT: tl.constexpr):
    if LIMIT is None:
        return x
    else:
        return tl.where(x < -LIMIT, -LIMIT, _at_most(x, LIMIT))


@triton.jit
def _curve(x, NAME: tl.constexpr):
    """gelu, gelu_tanh or relu2 of one number."""
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif NAME == "gelu_tanh":
        # 1 + tanh(x) is twice the sigmoid of 2 x.
        return x / (1.0 + tl.exp((x + 0.044715 * x * x * x) * _MINUS_TWICE_SQRT_2_OVER_PI))
    else:
        return tl.where(x < 0.0, 0.0, x * x)


@triton.jit
def _of_pair(
    gate,
    up,
    NAME: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
):
    if NAME == "silu":
        if LIMIT is not None:
            gate = _at_most(gate, LIMIT)
        return _silu(gate, ALPHA) * (_within(up, LIMIT) + BETA)
    elif NAME == "swiglustep":
        return _at_most(_silu(gate, 1.0), LIMIT) * _within(up, LIMIT)
    elif NAME == "situ":
        if LIMIT is not None:
            up = LIMIT * _tanh(up / LIMIT)
        return ALPHA * _tanh(gate / ALPHA) / (1.0 + tl.exp(-gate)) * up
    else:
        return _curve(gate, NAME) * up


@triton.jit
def activated(
    sums, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr
):
    """The activation of fp32 sums `[BLOCK_N, BLOCK_M]`: `[BLOCK_N // 2, BLOCK_M]` of a gated one,
    `[BLOCK_N, BLOCK_M]` of another, the sums themselves of None."""
    if NAME is None:
        return sums
    elif values_per_output(NAME) == 2:
        PAIRS: tl.constexpr = sums.shape[0] // 16
        BLOCK_M: tl.constexpr = sums.shape[1]
        pairs = tl.permute(tl.reshape(sums, (PAIRS, 2, 8, BLOCK_M)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        gate = tl.reshape(gate, (PAIRS * 8, BLOCK_M))
        up = tl.reshape(up, (PAIRS * 8, BLOCK_M))
        return _of_pair(gate, up, NAME, LIMIT, ALPHA, BETA)
    elif NAME == "silu_no_mul":
        return _silu(sums, 1.0)
    elif NAME == "gelu_no_mul":
        return _curve(sums, "gelu")
    elif NAME == "gelu_tanh_no_mul":
        return _curve(sums, "gelu_tanh")
    else:
        return _curve(sums, "relu2")
