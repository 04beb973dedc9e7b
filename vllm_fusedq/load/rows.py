"""Rows of several logical weights as those of one."""

from dataclasses import replace

import torch

from fusedq_kernels.layouts.stacked import alternate
from fusedq_kernels.types import LogicalWeight

_BY_ROWS = ("codes", "scales", "zeros", "row_scales")


def stack(pieces: list[LogicalWeight]) -> LogicalWeight:
    """One below the other."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    zeros = None if first.zeros is None else torch.cat([p.zeros for p in pieces])
    return LogicalWeight(
        codes=torch.cat([p.codes for p in pieces]),
        scales=torch.cat([p.scales for p in pieces]),
        zeros=zeros,
        spec=first.spec,
        phase=first.phase,
        perm=first.perm,
        in_features=first.in_features,
        row_scales=None if first.row_scales is None else torch.cat([p.row_scales for p in pieces]),
    )


def alternated(gate: LogicalWeight, up: LogicalWeight) -> LogicalWeight:
    """By turns, as `stacked.alternate` has them."""
    alternating = {
        name: alternate(one, getattr(up, name))
        for name in _BY_ROWS
        if (one := getattr(gate, name)) is not None
    }
    return replace(gate, **alternating)


def padded(weight: LogicalWeight, rows: int) -> LogicalWeight:
    """`weight` with rows behind it whose every scale is zero."""
    if not rows:
        return weight
    longer = {
        name: torch.cat([each, each.new_zeros(rows, *each.shape[1:])])
        for name in _BY_ROWS
        if (each := getattr(weight, name)) is not None
    }
    return replace(weight, **longer)
