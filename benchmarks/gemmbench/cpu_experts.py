"""A layer of experts on a CPU: ours in one call, and the unquantized experts one by one."""

import torch

from fusedq_kernels.activation import SILU
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.experts import Stack
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.types import QuantSpec, StackedWeight
from gemmbench.expert_shapes import ExpertsShape
from vllm_fusedq.measure.contenders import Contender, Run
from vllm_fusedq.measure.expert_contenders import Routing, stack, unquantized_experts
from vllm_fusedq.measure.random_weights import random_tokens, random_weight

CPU = torch.device("cpu")


def routings(shape: ExpertsShape, m: int) -> list[Routing]:
    """Every token asks other experts, and each routing others than the one before: what is asked
    was last read a whole layer ago."""
    order = torch.randperm(shape.count, generator=torch.Generator().manual_seed(0)).int()
    asked, top_k = min(m * shape.top_k, shape.count), shape.top_k
    weights = torch.full((m, top_k), 1 / top_k)
    places = torch.arange(m * top_k).view(m, top_k)
    return [
        Routing(order[(places + start) % shape.count], weights)
        for start in range(0, shape.count - asked + 1, asked)
    ]


def fused_experts(
    shape: ExpertsShape, spec: QuantSpec, dtype: torch.dtype, asked: list[Routing], name: str
) -> Contender:
    """Our operator, as a model calls it; its bytes are those of the experts that are asked."""
    up, down = (
        _call(n, k, spec, dtype)
        for n, k in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
    )
    weights = [stack(call, shape.count, CPU, ordered=False) for call in (up, down)]
    tensors = [tensor for weight in weights for tensor in Stack.of(weight)]
    text, experts = ExpertsCall(shape.count, SILU, up, down).text, torch.ops.fusedq.experts

    def of(routing: Routing) -> Run:
        routed = (routing.weights, routing.ids, None, *tensors, text)
        return lambda x, out: experts(x, *routed)

    size = sum(map(_bytes_of_one, weights)) * len(asked[0].ids.unique())
    return Contender(name, [of(each) for each in asked], size)


def dense_experts(
    shape: ExpertsShape, dtype: torch.dtype, asked: list[Routing], name: str
) -> Contender:
    """PyTorch's linear layers, an expert after the other."""
    sizes = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
    first = [random_tokens(n, k, dtype, CPU) / k**0.5 for n, k in sizes]
    # A quarter of the layer is more than any cache holds
    kept = range(max(shape.top_k, shape.count // 4))
    weights = [tuple(each.clone() for each in first) for _ in kept]
    each = [unquantized_experts(weights, routing) for routing in asked]
    return Contender(name, [one.runs[0] for one in each], each[0].bytes)


def _call(n: int, k: int, spec: QuantSpec, dtype: torch.dtype) -> Call:
    layout = KERNELS["cpu-fused"].layout(spec.weight_type)
    return Call.of(pack(random_weight(n, k, spec, CPU), layout, dtype), "cpu-fused", dtype)


def _bytes_of_one(weight: StackedWeight) -> float:
    tensors = (weight.qweight, weight.scales, weight.zeros)
    return sum(each.nbytes for each in tensors if each is not None) / len(weight.qweight)
