"""The weights of experts: `[experts, ...]` of a resident layout, one packed weight in each slice.

w13 holds the rows of gate (w1) and up (w3) in turn, `ALTERNATION` of each; w2 is as it is.
"""

import torch

from fusedq_kernels.call import ALTERNATION
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.packing import empty_packed
from fusedq_kernels.types import Layout, QuantSpec, StackedWeight


def empty_stacked(
    layout: Layout,
    count: int,
    n: int,
    k: int,
    spec: QuantSpec,
    phase: int,
    act_dtype: DType | torch.dtype,
    device: torch.device | str,
    in_features: int = 0,
    ordered: bool = False,
) -> StackedWeight:
    """`packing.empty_packed` for `count` experts at once."""
    size = (n, k, spec, phase, act_dtype)
    one = empty_packed(layout, *size, "meta", in_features=in_features, ordered=ordered)
    qweight, scales, zeros, perm = (
        None if t is None else torch.zeros((count, *t.shape), dtype=t.dtype, device=device)
        for t in (one.qweight, one.scales, one.zeros, one.perm)
    )
    return StackedWeight(qweight, scales, zeros, layout, spec, n, k, phase, perm, one.in_features)


def alternate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The rows of two `[N, ...]` in turn: `[2 N, ...]`; N is a multiple of `ALTERNATION`."""
    halves = [each.unflatten(0, (-1, ALTERNATION)) for each in (gate, up)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def apart(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, views `[M, N / 8, 8]`, of outputs `[M, 2 N]` whose columns alternate."""
    return y.unflatten(-1, (-1, 2, ALTERNATION)).unbind(-2)
