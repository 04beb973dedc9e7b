"""cpu-fused's experts: those of a layer in one call, only the chosen ones, threads over all pieces.

`../native/experts.h` is the code. Experts and, for each, pieces of its outputs are shared by all
threads; the activation follows each piece, and each token's sum has the order of its experts, in
fp32. What lies between the products is rounded to the activations' dtype, as is each row of the
second, as where each is an operator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.activation import ACTIVATIONS
from fusedq_kernels.cpu import fused

if TYPE_CHECKING:
    import torch

    from fusedq_kernels.call import Call, ExpertsCall

Weight = tuple["torch.Tensor | None", ...]


def prepare(call: ExpertsCall, multiply: Callable[[Call], object]) -> Callable[..., None]:
    """`run(x, topk_weights, topk_ids, expert_map, w13, w2, out)`; see `Kernel.prepare_experts`.

    Raises:
        BuildError: the kernel is not compiled and cannot be.
        ValueError: w2 is another kernel's.
    """
    if call.down.kernel != call.up.kernel:
        raise ValueError(f"{call.up.kernel} runs both w13 and w2, got {call.down.kernel} for w2")
    operator, told = fused.load_experts(), arguments(call)

    def run(
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        w13: Weight,
        w2: Weight,
        out: torch.Tensor,
    ) -> None:
        places = None if expert_map is None else expert_map.contiguous()
        routing = (topk_weights.contiguous(), topk_ids.contiguous(), places)
        (up, up_scales, _, *up_beside), (down, down_scales, _, *down_beside) = w13, w2
        weights = (up, up_scales, *up_beside, down, down_scales, *down_beside)
        operator(out, x, *routing, *weights, *told)

    return run


def arguments(call: ExpertsCall) -> tuple[list[int], list[float], int, int, list[float]]:
    """What the operator asks beside tensors: both products' numbers and codebooks, the features
    between them, the activation and its constants."""
    numbers, codebooks = [], []
    for of in (call.up, call.down):
        told, entries = fused.arguments(of.layout, of.spec, of.k, of.phase, of.dtype)
        numbers += told
        # Of one length, so that either is half of both
        codebooks += entries + [0.0] * (16 - len(entries))
    of = call.activation
    limit = math.nan if of.limit is None else of.limit
    number = ACTIVATIONS.index(of.name)
    return numbers, codebooks, call.down.in_features, number, [limit, of.alpha, of.beta]
