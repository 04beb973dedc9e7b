"""Shapes and dtypes of the resident tensors of each layout, as plain arithmetic.

`tiled.py` and `wna16.py` say what the tensors hold; planning asks here, without
torch, how many bytes they take.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import (
    BLOCK_K,
    BLOCK_N,
    WNA16_ALIGNMENT,
    GroupGeometry,
    group_geometry,
    round_up,
    wna16_geometry,
)
from fusedq_kernels.types import Layout, QuantSpec, holds

if TYPE_CHECKING:
    import torch

# int32 words per row and K block of a tiled layout, outputs per block of CPU_WNA16.
TILED_WORDS = {Layout.P4: 16, Layout.P8: 32, Layout.PL4: 16}
WNA16_BLOCK_N = 16

PERM_DTYPE = DType.INT32
# A vector of scales is one 16-byte copy at most.
_MAX_VECTOR = 4
# 8-bit scales stay in 16 bits, which hold them exactly.
KEPT_SCALES = {DType.FLOAT8_E4M3FN: DType.BFLOAT16, DType.FLOAT8_E8M0FNU: DType.BFLOAT16}


class ResidentTensor(NamedTuple):
    """Shape and dtype of one resident tensor."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ScaleWords(NamedTuple):
    """How a tiled layout lays out scales: `[vectors + tail, n_padded // rows, vector]` of `dtype`.

    `rows` neighbours of N (rows r and r + 8 of 16) share a word, `vector` neighbouring groups lie
    side by side: those of a K block, which the kernel then fetches by one copy. Scales of rows are
    the first n_padded words of the `tail`.
    """

    rows: int
    vector: int
    vectors: int
    dtype: DType
    tail: int = 0

    def shape(self, n_padded: int) -> tuple[int, int, int]:
        return self.vectors + self.tail, n_padded // self.rows, self.vector


def scale_words(spec: QuantSpec, groups: GroupGeometry) -> ScaleWords:
    """The one rule for the scales of a weight in a tiled layout.

    An asynchronous copy moves 4 bytes at least. A 16-bit scale shares its word with the zero point
    where there is one, else with the scale of another row; a 32-bit one has it to itself.
    """
    alone = spec.has_zero_points or spec.scale_dtype.itemsize == 4
    vector = min(_MAX_VECTOR, BLOCK_K // groups.step) if groups.step == spec.group_size else 1
    vectors = groups.num_groups
    if vector > 1:
        # Whole blocks, so that a load beyond the last group reads what nothing multiplies.
        vectors = groups.k_padded // (groups.step * vector)
    dtype = DType.FLOAT32 if spec.scale_dtype is DType.FLOAT32 else DType.INT32
    rows = 1 if alone else 2
    return ScaleWords(rows, vector, vectors, dtype, -(-rows // vector) if spec.row_scaled else 0)


def kept_dtype(scale_dtype: DType) -> DType:
    """The dtype in which a tiled layout keeps scales: the same numbers, in 16 bits at least."""
    return KEPT_SCALES.get(scale_dtype, scale_dtype)


def resident_tensors(
    layout: Layout,
    n: int,
    k: int,
    spec: QuantSpec,
    phase: int,
    act_dtype: DType | torch.dtype,
) -> dict[str, ResidentTensor]:
    """Shape and dtype of each resident tensor, by `PackedWeight` field name.

    `zeros` is present only where the layout keeps zero points apart. `act_dtype` matters to
    CPU_WNA16 alone. Raises ValueError for a scheme that the layout cannot hold.
    """
    if not holds(layout, spec.weight_type):
        raise ValueError(f"layout {layout.value} does not hold {spec.weight_type.value}")
    if spec.row_scaled and layout not in TILED_WORDS:
        raise ValueError(f"layout {layout.value} does not hold scales of rows")
    return _SHAPES[layout](layout, n, k, spec, phase, DType.of(act_dtype))


def _tiled(
    layout: Layout, n: int, k: int, spec: QuantSpec, phase: int, act_dtype: DType
) -> dict[str, ResidentTensor]:
    if spec.has_zero_points and spec.scale_dtype.itemsize != 2:
        raise ValueError(
            f"layout {layout.value} keeps a 16-bit scale beside each zero point, "
            f"got {spec.scale_dtype}"
        )
    geometry = group_geometry(k, spec.group_size, phase)
    n_padded = round_up(n, BLOCK_N)
    num_blocks = geometry.k_padded // BLOCK_K
    words = scale_words(spec, geometry)
    return {
        "qweight": ResidentTensor((num_blocks, n_padded, TILED_WORDS[layout]), DType.INT32),
        "scales": ResidentTensor(words.shape(n_padded), words.dtype),
    }


def _wna16(
    layout: Layout, n: int, k: int, spec: QuantSpec, phase: int, act_dtype: DType
) -> dict[str, ResidentTensor]:
    if act_dtype not in (DType.FLOAT16, DType.BFLOAT16):
        raise ValueError(f"layout {layout.value} needs fp16 or bf16 activations, got {act_dtype}")
    geometry = wna16_geometry(k, spec.group_size, phase)
    n_padded = round_up(n, WNA16_ALIGNMENT)
    blocks = n_padded // WNA16_BLOCK_N
    tensors = {
        "qweight": ResidentTensor((blocks, 2 * geometry.k_padded), DType.INT32),
        "scales": ResidentTensor((geometry.num_groups, n_padded), act_dtype),
    }
    if spec.has_zero_points:
        tensors["zeros"] = ResidentTensor((geometry.num_groups, n_padded // 8), DType.INT32)
    return tensors


_SHAPES: dict[Layout, Callable[..., dict[str, ResidentTensor]]] = {
    Layout.P4: _tiled,
    Layout.P8: _tiled,
    Layout.PL4: _tiled,
    Layout.CPU_WNA16: _wna16,
}
