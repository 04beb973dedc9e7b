"""Layers of random experts, as kernels take them and as the oracle does."""

from dataclasses import replace

import torch

from fusedq_kernels import experts, reference, testing
from fusedq_kernels.activation import SILU, Activation
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.experts import Stack
from fusedq_kernels.layouts import packing, stacked
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    TILED_LAYOUTS,
    LogicalWeight,
    Policy,
    QuantSpec,
    StackedWeight,
)

HIDDEN, INNER, COUNT = 64, 48, 5


def stack(weights: list[LogicalWeight], dtype: torch.dtype) -> StackedWeight:
    first = weights[0]
    n, k = first.codes.shape
    layout = TILED_LAYOUTS[first.spec.weight_type]
    packed = stacked.empty_stacked(
        *(layout, len(weights), n, k, first.spec, first.phase, dtype, "cpu"),
        in_features=first.in_features,
        ordered=first.perm is not None,
    )
    for index, weight in enumerate(weights):
        packing.pack_rows(packed.expert(index), 0, weight)
        if weight.perm is not None:
            packed.perm[index] = weight.perm
    return packed


def alternating(gate: LogicalWeight, up: LogicalWeight) -> LogicalWeight:
    """Row by row, which shares nothing with what the library does."""
    rows = [
        (each, row)
        for start in range(0, gate.codes.shape[0], 8)
        for each in (gate, up)
        for row in range(start, start + 8)
    ]
    tensors = {
        name: torch.stack([getattr(each, name)[row] for each, row in rows])
        for name in ("codes", "scales", "zeros")
        if getattr(gate, name) is not None
    }
    return replace(gate, **tensors)


class Layer:
    """Random experts, stacked and as the oracle takes them; w2 starts inside a group."""

    def __init__(
        self,
        spec: QuantSpec,
        dtype: torch.dtype = torch.float16,
        phase: int = 16,
        activation: Activation = SILU,
        kernel: str = "cpu-striped",
        policy: Policy = DEFAULT_POLICY,
        hidden: int = HIDDEN,
    ) -> None:
        self.weights = {
            number: reference.Expert(
                *(
                    testing.random_logical(n, k, spec, p, seed=3 * number + side)
                    for side, (n, k, p) in enumerate(
                        [(INNER, hidden, 0), (INNER, hidden, 0), (hidden, INNER, phase)]
                    )
                )
            )
            for number in range(COUNT)
        }
        first = [
            alternating(e.gate, e.up) if activation.is_gated else e.gate
            for e in self.weights.values()
        ]
        self.w13 = stack(first, dtype)
        self.w2 = stack([e.down for e in self.weights.values()], dtype)
        self.call = ExpertsCall(
            *(COUNT, activation),
            *(Call.of(each.expert(0), kernel, dtype, policy) for each in (self.w13, self.w2)),
        )

    def __call__(self, x, weights, ids, expert_map=None) -> torch.Tensor:
        stacks = Stack.of(self.w13), Stack.of(self.w2)
        return experts.experts(x, weights, ids, expert_map, *stacks, self.call)


def routing(m: int, top_k: int = 2, seed: int = 0, count: int = COUNT, hidden: int = HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((m, hidden), generator=generator)
    ids = torch.rand((m, count), generator=generator).argsort(1)[:, :top_k].int()
    return x, torch.rand((m, top_k), generator=generator), ids
