"""`torch.ops.fusedq.experts`: the experts of one layer as one operator, its checks and its fake.

    experts(x, topk_weights, topk_ids, expert_map, w13.., w2.., call) -> y

What data decides (which experts run, with how many tokens) happens inside, so that a traced graph
has one node for it. `call` is the text of an `ExpertsCall`. Importing this module registers the
operator.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.catalogue import KERNELS, Kernel
from fusedq_kernels.layouts.packing import TensorSpec
from fusedq_kernels.prepared import Prepared, check_tensor, prepared
from fusedq_kernels.types import PackedWeight, StackedWeight

TENSORS = ("qweight", "scales", "zeros", "bias", "perm")
"""The stacked tensors of w13 and of w2, in the operator's order; zeros, bias and perm optional."""

_OPTIONAL = ("zeros", "bias", "perm")
_WEIGHTS = ", ".join(
    f"Tensor{'?' if name in _OPTIONAL else ''} {weight}_{name}"
    for weight in ("w13", "w2")
    for name in TENSORS
)
_SCHEMA = (
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    f"{_WEIGHTS}, str call) -> Tensor"
)


class Stack(NamedTuple):
    """The tensors of w13 or of w2, each with a leading dimension of experts."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    perm: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: StackedWeight, bias: torch.Tensor | None = None) -> "Stack":
        return cls(weight.qweight, weight.scales, weight.zeros, bias, weight.perm)


@dataclass(frozen=True, slots=True)
class ResidentExperts:
    """The experts of a layer as they serve: weights, and what differs from model to model.

    Attributes:
        call: what is done with them.
        w13, w2: their weights.
        top_k: how many experts a token asks.
        places: the length of the expert map that calls pass, None where they pass none.
    """

    call: ExpertsCall
    w13: Stack
    w2: Stack
    top_k: int
    places: int | None = None

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.call.up.kernel]

    @property
    def all_experts(self) -> int:
        """Those of the layer on all ranks together."""
        return self.call.count if self.places is None else self.places

    def first(self) -> PackedWeight:
        """The first expert's w13, by which schemes and devices are known."""
        return self.expert(0)[0]

    def expert(self, place: int) -> tuple[PackedWeight, PackedWeight]:
        """w13 and w2 of one expert, views."""
        up, down = (
            of.packed(*(None if each is None else each[place] for each in (*stack[:3], stack.perm)))
            for of, stack in ((self.call.up, self.w13), (self.call.down, self.w2))
        )
        return up, down

    def as_meta(self) -> "ResidentExperts":
        """The same without bytes, to compile for."""
        w13, w2 = (
            Stack(*(None if each is None else each.to("meta") for each in stack))
            for stack in (self.w13, self.w2)
        )
        return replace(self, w13=w13, w2=w2)


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: Stack,
    w2: Stack,
    call: ExpertsCall,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it; those of other ranks add nothing.

    Args:
        x: `[M, H]` fp16 or bf16, any strides.
        topk_weights: fp32 `[M, top_k]`.
        topk_ids: int32 or int64 `[M, top_k]`, experts by their number in the model.
        expert_map: int32 `[experts of the model]`, where each lies in the stacks, -1 on another
            rank; None where all are here in order. An id without a place adds nothing.
        w13: rows of gate and up in turn, `call.ALTERNATION` of each.
        w2: `[experts, ..]` of the way back.
        call: kernels, sizes, activation.

    Returns:
        y: `[M, H]`, contiguous, dtype of `x`: this rank's part of the sum.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the call asks for.
    """
    return torch.ops.fusedq.experts(x, topk_weights, topk_ids, expert_map, *w13, *w2, call.text)


class PreparedExperts:
    """What one call asks of its tensors, and what runs it: decided once for each text."""

    def __init__(self, call: ExpertsCall) -> None:
        self.call, self.kernel = call, KERNELS[call.up.kernel]
        self.up, self.down = prepared(call.up.text), prepared(call.down.text)
        for each in (self.up, self.down):
            if each.kernel.experts_by is None:
                able = ", ".join(k.name for k in KERNELS.values() if k.experts_by is not None)
                raise ValueError(f"kernel {each.kernel.name} runs no experts; supported: {able}")
        if self.kernel.device != self.down.kernel.device:
            raise ValueError(f"{call.up.kernel} and {call.down.kernel} run on different devices")

    def check(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        w13: Stack,
        w2: Stack,
    ) -> None:
        """Raise ValueError, saying found and expected, for operands of other experts."""
        if x.ndim != 2 or x.shape[1] != self.up.in_features or x.dtype != self.up.dtype:
            raise ValueError(
                f"x must be {self.up.dtype} [M, {self.up.in_features}], got {x.dtype} "
                f"{list(x.shape)}"
            )
        if x.is_cuda and self.up.on_cpu:
            raise ValueError(f"kernel {self.kernel.name} runs on a CPU, x is on {x.device}")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
        if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
            raise ValueError(f"topk_ids must be [M, top_k], got {list(topk_ids.shape)}")
        if topk_weights.shape != topk_ids.shape or topk_weights.dtype != torch.float32:
            raise ValueError(
                f"topk_weights must be torch.float32 {list(topk_ids.shape)}, got "
                f"{topk_weights.dtype} {list(topk_weights.shape)}"
            )
        if expert_map is not None and expert_map.ndim != 1:
            raise ValueError(f"expert_map must be [experts], got {list(expert_map.shape)}")
        for name, stack, ready in (("w13", w13, self.up), ("w2", w2, self.down)):
            self._check_stack(name, stack, ready, x.device)

    def _check_stack(self, name: str, stack: Stack, ready: Prepared, device: torch.device) -> None:
        for field in TENSORS:
            tensor, one = getattr(stack, field), getattr(ready, field)
            absent = tensor is None and (one is None or field in ("bias", "perm"))
            if absent and (field != "perm" or ready.in_features == ready.call.k):
                continue
            stacked = one and TensorSpec((self.call.count, *one.shape), one.dtype)
            check_tensor(f"{name}_{field}", tensor, stacked, device)

    @functools.cached_property
    def run(self) -> Any:
        return self.kernel.prepare_experts(self.call, _multiply)


@functools.cache
def prepared_experts(text: str) -> PreparedExperts:
    """What is ready for the call of that text; raises ValueError as `ExpertsCall.parse` does."""
    return PreparedExperts(ExpertsCall.parse(text))


def _multiply(call: Call) -> Any:
    return KERNELS[call.kernel].prepare(call, None)


def _operands(tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    *routing, weights = (*tensors[:4], tensors[4:])
    return *routing, Stack(*weights[: len(TENSORS)]), Stack(*weights[len(TENSORS) :])


def _experts(*tensors_and_call: Any) -> torch.Tensor:
    *tensors, call = tensors_and_call
    ready, (x, *others) = prepared_experts(call), _operands(tuple(tensors))
    ready.check(x, *others)
    out = x.new_empty((x.shape[0], ready.down.n))
    if x.shape[0]:
        ready.run(x.contiguous(), *others, out)
    return out


def _experts_fake(*tensors_and_call: Any) -> torch.Tensor:
    *tensors, call = tensors_and_call
    ready, (x, *others) = prepared_experts(call), _operands(tuple(tensors))
    ready.check(x, *others)
    return x.new_empty((x.shape[0], ready.down.n))


if not hasattr(torch.ops.fusedq, "experts"):
    # Held by the module: the operator goes away with its Library.
    _LIBRARY = torch.library.Library("fusedq", "FRAGMENT")
    _LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl("experts", _experts, _key)
    torch.library.register_fake("fusedq::experts", _experts_fake, lib=_LIBRARY)
