"""cpu-gather: rows of a packed weight by token ids, dequantized, from any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.choose import refusals
from fusedq_kernels.geometry import BLOCK_K
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import GemmShape, Launch, QuantSpec, Reason

if TYPE_CHECKING:
    from fusedq_kernels.call import Call
    from fusedq_kernels.types import LogicalWeight

# Values that are dequantized at a time: they stay in a core's cache.
STRIPE_VALUES = 1 << 19


def refuses(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Against K, scheme and phase of a rank's weight."""
    return refusals.of_tiled_scales(spec)


def scratch_bytes(launch: Launch, shape: GemmShape) -> int:
    """The largest of what a call allocates: fp32 values of a stripe of rows."""
    padded = shape.k + BLOCK_K
    return 4 * min(shape.m * padded, max(STRIPE_VALUES, padded))


def prepare(call: Call, tile: None = None) -> Callable[..., None]:
    """`run(ids, qweight, scales, zeros, perm, out)`; see `catalogue.Kernel.prepare`."""
    from fusedq_kernels.layouts import packing

    stripe, dtype = max(1, STRIPE_VALUES // call.k), call.dtype.torch

    def run(
        ids: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        perm: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        packed = call.packed(qweight, scales, zeros, perm)
        known = (ids >= 0) & (ids < call.n)
        rows = ids * known
        for start in range(0, len(rows), stripe):
            stop = start + stripe
            values = _values(packing.gather(packed, rows[start:stop]), dtype)
            values.mul_(known[start:stop, None])
            if perm is None:
                out[start:stop] = values
            else:
                out[start:stop].index_copy_(1, perm.long(), values.to(dtype))

    return run


def _values(rows: LogicalWeight, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `[M, K]`; the entries of a codebook are rounded to `dtype` first."""
    values = _by_groups(rows, dtype)
    return values if rows.row_scales is None else values.mul_(rows.row_scales[:, None])


def _by_groups(rows: LogicalWeight, dtype: torch.dtype) -> torch.Tensor:
    spec, k = rows.spec, rows.codes.shape[1]
    repeats = min(spec.group_size, k)
    scales, zeros = (
        None if each is None else each.to(torch.float32).repeat_interleave(repeats, 1)[:, :k]
        for each in (rows.scales, rows.zeros)
    )
    if spec.weight_type.codebook is not None:
        table = torch.tensor(spec.weight_type.codebook).to(dtype).to(torch.float32)
        return table[rows.codes.int()].mul_(scales)
    values = rows.codes.to(torch.float32)
    return values.sub_(spec.weight_type.bias if zeros is None else zeros).mul_(scales)
