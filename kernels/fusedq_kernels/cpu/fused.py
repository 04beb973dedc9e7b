"""cpu-fused: our own kernel for CPUs, on the tiled layouts that a GPU reads.

`../native/` is its code. The weight is decoded in registers for few tokens and into the first-level
cache for many; whole weights never exist. Every weight type is decoded exactly, products are summed
in fp32 in one order whatever the number of tokens or threads, scales multiply fp32 sums.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.choose import refusals
from fusedq_kernels.dtype import DType
from fusedq_kernels.encodings import Codebook
from fusedq_kernels.geometry import BLOCK_K, group_geometry
from fusedq_kernels.layouts.resident import scale_words
from fusedq_kernels.lazy import torch
from fusedq_kernels.native.build import BuildError, forget, library
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import GemmShape, Launch, Layout, QuantSpec, Reason, WeightType

if TYPE_CHECKING:
    from fusedq_kernels.call import Call
    from fusedq_kernels.types import PackedWeight

# `Codes` and `ScaleKind` of ../native/.
_INT4, _INT4_ZEROS, _CODEBOOK4, _INT8, _FLOAT_E4M3, _FLOAT_E2M1 = range(6)
_FLOATS_OF = {WeightType.FLOAT8_E4M3FN: _FLOAT_E4M3, WeightType.FLOAT4_E2M1F: _FLOAT_E2M1}
_FLOATS, _PAIRS, _BESIDE_ZEROS = range(3)

# Of a thread: sums, a panel of decoded weights, the tokens beside it, scales of a block.
_THREAD_SCRATCH = 3 << 19
# Up to so many the whole of them is laid out at once, in fp32 at most.
_FEW_TOKENS = 8


def refuses(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Against K, scheme and phase of a rank's weight."""
    return refusals.of_tiled_scales(spec) + refusals.of_odd_groups(k, spec, phase)


def scratch_bytes(launch: Launch, shape: GemmShape) -> int:
    """The largest of what a call keeps: tokens as the kernel reads them, sums of each thread."""
    tokens = 4 * min(shape.m, _FEW_TOKENS) * (shape.k + BLOCK_K)
    return tokens + _THREAD_SCRATCH * (os.cpu_count() or 1)


def prepare(call: Call, tile: None = None) -> Callable[..., None]:
    """`run(x, qweight, scales, zeros, bias, out)` for one layer; see `catalogue.Kernel.prepare`.

    Raises:
        BuildError: the kernel is not compiled and cannot be.
    """
    size = (call.layout, call.spec, call.k, call.phase)
    numbers, codebook = arguments(*size, call.dtype)
    operator = load()

    def run(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        operator(out, x, qweight, scales, bias, None, numbers, codebook)

    return run


def bare_call(packed: PackedWeight, act_dtype: torch.dtype) -> Callable[..., None]:
    """The bare operator, for a graph that torch.compile traces: nothing of Python runs around it.

    Returns:
        `call(out, x, qweight, scales, zeros, bias, perm)` on `x` `[M, in_features]` and `out`
        `[M, N]`.
    """
    size = (packed.layout, packed.spec, packed.k, packed.phase)
    numbers, codebook = arguments(*size, DType.of(act_dtype))
    operator = load()

    def call(
        out: torch.Tensor,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        perm: torch.Tensor | None,
    ) -> None:
        operator(out, x, qweight, scales, bias, perm, numbers, codebook)

    return call


def load() -> Callable[..., None]:
    """The operator for this machine, compiled if it must be; raises BuildError.

    `(out, x, qweight, scales, bias, perm, numbers, codebook)`, which trusts its operands.
    """
    return _loaded()[0]


def load_experts() -> Callable[..., None]:
    """The operator of experts, as `load`; `fused_experts.py` knows its arguments."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Callable[..., None], Callable[..., None]]:
    isa = this_isa()
    path = library(isa)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        message = f"{path} is damaged; remove it, and it is compiled again: {error}"
        raise BuildError(message) from None
    forget(path)
    names = (isa.operator, f"{isa.operator}_experts")
    for name in names:
        torch.library.register_fake(f"fusedq_cpu::{name}", _fake)
    multiply, experts = (getattr(torch.ops.fusedq_cpu, name).default for name in names)
    return multiply, experts


def _fake(*operands: object) -> None:
    """It writes into its first operand alone."""


def arguments(
    layout: Layout, spec: QuantSpec, k: int, phase: int, dtype: DType
) -> tuple[list[int], list[float]]:
    """What the operator asks beside tensors, in the order of its `numbers`, and the codebook."""
    geometry, weight_type = group_geometry(k, spec.group_size, phase), spec.weight_type
    words = scale_words(spec, geometry)
    table = weight_type.codebook if isinstance(weight_type.encoding, Codebook) else ()
    if table:
        codes = _CODEBOOK4
    elif weight_type in _FLOATS_OF:
        codes = _FLOATS_OF[weight_type]
    elif weight_type.bits == 8:
        codes = _INT8
    else:
        codes = _INT4_ZEROS if spec.has_zero_points else _INT4
    alone = _PAIRS if words.rows == 2 else _FLOATS
    kind = _BESIDE_ZEROS if spec.has_zero_points else alone
    half = spec.scale_dtype is DType.FLOAT16
    numbers = [
        *(codes, weight_type.bias or 0, k, spec.group_size, geometry.step, geometry.pad),
        *(geometry.offset, geometry.num_groups - 1, kind, int(half)),
        words.vectors if spec.row_scaled else -1,
    ]
    # Entries are what the activations' dtype makes of them, on every kernel
    entries = torch.tensor(table, dtype=torch.float64)
    return numbers, entries.to(dtype.torch).tolist()
