"""A layer of experts, timed as one: our operator beside the unquantized experts, one by one."""

from dataclasses import dataclass

import torch

from fusedq_kernels.activation import SILU
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.experts import Stack
from fusedq_kernels.layouts.stacked import empty_stacked
from fusedq_kernels.types import StackedWeight
from vllm_fusedq.measure.contenders import DENSE, FUSED, Contender, packed_for
from vllm_fusedq.measure.random_weights import random_tokens
from vllm_fusedq.plan.layer import LayerPlan

# Unquantized experts take turns in so many bytes, which is more than any cache holds
DENSE_BYTES = 2e9


@dataclass(frozen=True)
class Routing:
    """What M tokens ask, uniformly and each of other experts: `ids` and `weights` [M, top_k]."""

    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def uniform(cls, m: int, top_k: int, count: int, device: torch.device) -> "Routing":
        generator = torch.Generator().manual_seed(0)
        ids = torch.rand(m, count, generator=generator).topk(top_k).indices
        weights = torch.full((m, top_k), 1 / top_k)
        return cls(ids.int().to(device), weights.to(device))

    def of_experts(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """For each expert that is asked: its number, its tokens, and the places that asked."""
        found = []
        for number in self.ids.unique().tolist():
            rows, places = (self.ids == number).nonzero(as_tuple=True)
            found.append((number, rows, places))
        return found


def stack(call: Call, count: int, device: torch.device, ordered: bool) -> StackedWeight:
    """`count` copies of one random weight, each in its own place."""
    one = packed_for(call, device, ordered)
    stacked = empty_stacked(
        *(call.layout, count, call.n, call.k, call.spec, call.phase, call.dtype, device),
        in_features=call.in_features,
        ordered=ordered,
    )
    for name in ("qweight", "scales", "zeros", "perm"):
        if (tensor := getattr(stacked, name)) is not None:
            tensor.copy_(getattr(one, name).expand_as(tensor))
    return stacked


def fused_experts(up: LayerPlan, down: LayerPlan, routing: Routing, stacks: tuple) -> Contender:
    """Our operator, called as a model calls it; its bytes are those of experts that are asked."""
    count = up.shard.count
    call = ExpertsCall(count, SILU, up.main.call, down.main.call).text
    tensors = [tensor for weight in stacks for tensor in Stack.of(weight)]
    asked = len(routing.ids.unique())
    size = sum(bytes_ for plan in (up, down) for _, bytes_ in plan.resident) / count * asked
    experts = torch.ops.fusedq.experts

    def run(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return experts(x, routing.weights, routing.ids, None, *tensors, call)

    return Contender(FUSED, [run], size)


def dense_experts(
    up: LayerPlan, down: LayerPlan, dtype: torch.dtype, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Unquantized w13 and w2 of as many experts as `DENSE_BYTES` hold, all of them at most."""
    size = dtype.itemsize * (up.n * up.k + down.n * down.k)
    shapes = ((up.n, up.k), (down.n, down.k))
    first = [random_tokens(n, k, dtype, device) / k**0.5 for n, k in shapes]
    number = min(up.shard.count, max(1, int(DENSE_BYTES / size)))
    return [tuple(each.clone() for each in first) for _ in range(number)]


def unquantized_experts(
    weights: list[tuple[torch.Tensor, torch.Tensor]], routing: Routing
) -> Contender:
    """Each expert that is asked multiplies its tokens, as PyTorch does it without a kernel."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    asked = routing.of_experts()

    def run(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for number, rows, places in asked:
            w13, w2 = weights[number % len(weights)]
            gate, up = linear(x[rows], w13).chunk(2, dim=1)
            product = linear(silu(gate) * up, w2)
            y.index_add_(0, rows, product * routing.weights[rows, places, None].to(x.dtype))
        return y

    size = len(asked) * sum(each.nbytes for each in weights[0])
    return Contender(DENSE, [run], size)


def stacked_pair(
    up: LayerPlan, down: LayerPlan, device: torch.device
) -> tuple[StackedWeight, StackedWeight]:
    """Random w13 and w2 of all experts of the rank."""
    w13, w2 = (stack(p.main.call, p.shard.count, device, p.ordered) for p in (up, down))
    return w13, w2
