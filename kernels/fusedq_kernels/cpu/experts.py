"""Experts on a CPU: those that tokens chose, one after the other, each by kernels of a matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.cpu.activations import activated
from fusedq_kernels.lazy import torch

if TYPE_CHECKING:
    from fusedq_kernels.call import Call, ExpertsCall

Multiply = Callable[..., None]


def prepare(call: ExpertsCall, multiply: Callable[[Call], Multiply]) -> Callable[..., None]:
    """`run(x, topk_weights, topk_ids, expert_map, w13, w2, out)`; see `Kernel.prepare_experts`.

    Experts come in ascending order, and so do the terms of a token's sum, in fp32: the same bits in
    every run. A product is rounded to the activations' dtype, and so is the activation, as where
    each is an operator of its own.

    Args:
        multiply: `catalogue.Kernel.prepare` of the kernel that a call names.
    """
    up, down = multiply(call.up), multiply(call.down)

    def run(
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        w13: tuple[torch.Tensor | None, ...],
        w2: tuple[torch.Tensor | None, ...],
        out: torch.Tensor,
    ) -> None:
        sums = torch.zeros(out.shape, dtype=torch.float32)
        weights, top_k = topk_weights.reshape(-1, 1), topk_ids.shape[1]
        for expert, slots in _by_expert(topk_ids, expert_map, call.count):
            tokens = slots // top_k
            inner = x.new_empty((len(slots), call.up.n))
            _multiply(up, _features(x.index_select(0, tokens), w13, expert), w13, expert, inner)
            hidden = activated(call.activation, inner.float()).to(x.dtype)
            y = x.new_empty((len(slots), call.down.n))
            _multiply(down, _features(hidden, w2, expert), w2, expert, y)
            sums.index_add_(0, tokens, y.float().mul_(weights[slots]))
        out.copy_(sums)

    return run


def _by_expert(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, count: int
) -> list[tuple[int, torch.Tensor]]:
    """Experts of this rank that were chosen, ascending, each with its slots `token * top_k + i`."""
    ids = topk_ids.reshape(-1).long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = torch.where(known, expert_map.long()[ids * known], -1)
    ids = torch.where((ids >= 0) & (ids < count), ids, count)
    order, counts = ids.argsort(stable=True), ids.bincount(minlength=count + 1).tolist()
    found, start = [], 0
    for expert, rows in enumerate(counts[:count]):
        if rows:
            found.append((expert, order[start : start + rows]))
        start += rows
    return found


def _features(
    x: torch.Tensor, weight: tuple[torch.Tensor | None, ...], expert: int
) -> torch.Tensor:
    perm = weight[-1]
    return x if perm is None else x.index_select(1, perm[expert])


def _multiply(
    run: Multiply,
    x: torch.Tensor,
    weight: tuple[torch.Tensor | None, ...],
    expert: int,
    out: torch.Tensor,
) -> None:
    qweight, scales, zeros, bias = (None if t is None else t[expert] for t in weight[:-1])
    run(x, qweight, scales, zeros, bias, out)
