"""What multiplies tokens by the experts that they ask: ours, whole and in parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import triton

from fusedq_kernels import experts
from fusedq_kernels.activation import SILU
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.choose.experts import ExpertsLaunch, Load, select
from fusedq_kernels.cuda.grouped import Product
from fusedq_kernels.cuda.routed import Routed
from fusedq_kernels.cuda.routing import Router
from fusedq_kernels.experts import Stack
from fusedq_kernels.layouts import packing, stacked
from fusedq_kernels.types import TILED_LAYOUTS, LogicalWeight, Policy, StackedWeight
from gemmbench.expert_layers import RandomExperts
from gemmbench.own import device_spec

_KERNEL = "triton-gemm"
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PreparedExperts(NamedTuple):
    """Experts of a layer, packed. `run(x, topk_weights, topk_ids)` gives `[M, hidden]`, or a part
    of the work where it is not `checked`; `detail(m)` says by what."""

    run: Run
    detail: Callable[[int], str]
    checked: bool = True


class ExpertsContender(Protocol):
    """One line of the comparison."""

    name: str

    def version(self) -> str:
        """Package and version. Raises Unavailable where it is not installed or cannot load."""

    def prepare(self, layer: RandomExperts, act_dtype: torch.dtype) -> PreparedExperts:
        """Pack all experts. Raises Unavailable for those that it does not run."""


class Packed(NamedTuple):
    """Both stacks, and the call of them."""

    w13: StackedWeight
    w2: StackedWeight
    call: ExpertsCall


def packed(layer: RandomExperts, act_dtype: torch.dtype, policy: Policy) -> Packed:
    """All experts of a rank in our layout."""
    shape, spec = layer.shape, layer.spec
    layout = TILED_LAYOUTS[spec.weight_type]
    sizes = ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
    w13, w2 = (
        stacked.empty_stacked(layout, shape.count, *size, spec, 0, act_dtype, layer.device)
        for size in sizes
    )
    for number in range(shape.count):
        gate, up, down = layer.expert(number)
        packing.pack_rows(w13.expert(number), 0, alternating(gate, up))
        packing.pack_rows(w2.expert(number), 0, down)
    calls = (Call.of(each.expert(0), _KERNEL, act_dtype, policy) for each in (w13, w2))
    return Packed(w13, w2, ExpertsCall(shape.count, SILU, *calls))


def alternating(gate: LogicalWeight, up: LogicalWeight) -> LogicalWeight:
    """Rows of both in turn, as w13 holds them."""
    zeros = None if gate.zeros is None else stacked.alternate(gate.zeros, up.zeros)
    codes, scales = (
        stacked.alternate(getattr(gate, name), getattr(up, name)) for name in ("codes", "scales")
    )
    return replace(gate, codes=codes, scales=scales, zeros=zeros)


@dataclass(frozen=True)
class FusedExperts:
    """`torch.ops.fusedq.experts` as a model calls it, or in batch-invariant mode."""

    name: str = "fusedq"
    batch_invariant: bool = False

    def version(self) -> str:
        return f"triton {triton.__version__}"

    def prepare(self, layer: RandomExperts, act_dtype: torch.dtype) -> PreparedExperts:
        own = packed(layer, act_dtype, Policy(batch_invariant=self.batch_invariant))
        stacks, places = (Stack.of(own.w13), Stack.of(own.w2)), layer.expert_map

        def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return experts.experts(x, weights, ids, places, *stacks, own.call)

        return PreparedExperts(run, lambda m: _launch(layer, own.call, m).source)


@dataclass(frozen=True)
class Part:
    """One of our launches alone: "sort", "up", "down" or "sum"."""

    part: str

    @property
    def name(self) -> str:
        return f"fusedq-{self.part}"

    def version(self) -> str:
        return f"triton {triton.__version__}"

    def prepare(self, layer: RandomExperts, act_dtype: torch.dtype) -> PreparedExperts:
        own, places, shape = packed(layer, act_dtype, Policy()), layer.expert_map, layer.shape

        def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            launch = _launch(layer, own.call, len(x))
            router, slots = Router(shape.count, shape.top_k, launch.block_m), ids.numel()
            routing = router.sort(ids, places)
            rows = routing.blocks * launch.block_m
            if self.part == "up":
                inner, way = x.new_empty((rows, shape.inner)), _up(shape.top_k)
                product = Product(own.call.up, launch.up, shape.count)
                product(x, Stack.of(own.w13), inner, routing, slots, way)
                return inner
            if self.part == "down":
                inner, y = x.new_zeros((rows, shape.inner)), x.new_empty((slots, shape.hidden))
                product = Product(own.call.down, launch.down, shape.count)
                product(inner, Stack.of(own.w2), y, routing, slots, Routed(1, x_sorted=True))
                return y
            if self.part == "sum":
                y, out = x.new_zeros((slots, shape.hidden)), torch.empty_like(x)
                router.sum(y, weights, ids, places, out)
                return out
            return routing.slots

        return PreparedExperts(run, lambda m: "with what sorts", checked=False)


def _up(top_k: int) -> Routed:
    return Routed(top_k, y_sorted=True, activation=SILU)


def _launch(layer: RandomExperts, call: ExpertsCall, m: int) -> ExpertsLaunch:
    load = Load(m, layer.shape.top_k, layer.shape.all_experts)
    return select(call, load, device_spec(layer.device))


OWN_EXPERTS = (
    FusedExperts(),
    FusedExperts("fusedq-invariant", batch_invariant=True),
    *(Part(name) for name in ("sort", "up", "down", "sum")),
)
