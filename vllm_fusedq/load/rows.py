"""Rows of several logical weights as those of one."""

from dataclasses import replace

import torch

from fusedq_kernels.layouts.stacked import alternate
from fusedq_kernels.types import LogicalWeight


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
    )


def alternated(gate: LogicalWeight, up: LogicalWeight) -> LogicalWeight:
    """By turns, as `stacked.alternate` has them."""
    codes, scales, zeros = (
        None if one is None else alternate(one, other)
        for one, other in (
            (gate.codes, up.codes),
            (gate.scales, up.scales),
            (gate.zeros, up.zeros),
        )
    )
    return replace(gate, codes=codes, scales=scales, zeros=zeros)


def padded(weight: LogicalWeight, rows: int) -> LogicalWeight:
    """`weight` with rows behind it whose every scale is zero."""
    if not rows:
        return weight
    codes, scales, zeros = (
        None if each is None else torch.cat([each, each.new_zeros(rows, each.shape[1])])
        for each in (weight.codes, weight.scales, weight.zeros)
    )
    return replace(weight, codes=codes, scales=scales, zeros=zeros)
