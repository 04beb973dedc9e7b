"""Random experts, routings of many kinds, and the least that a layer of experts moves."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedq_kernels import reference
from fusedq_kernels.types import LogicalWeight, QuantSpec
from gemmbench.expert_shapes import ExpertsShape
from vllm_fusedq.measure.random_weights import random_weight

# The n-th most popular expert is asked 1 / n as often as the first, where routing is "zipf".
ROUTINGS = {"uniform": 0.0, "zipf": 1.0}


class Draw(NamedTuple):
    """Which experts tokens ask, int32 `[M, top_k]`, with what weight, and which of them are here:
    `touched` experts with `slots` choices among them."""

    ids: torch.Tensor
    weights: torch.Tensor
    touched: int
    slots: int


@dataclass(frozen=True)
class RandomExperts:
    """Experts of one rank, made anew from their numbers whenever they are asked for."""

    shape: ExpertsShape
    spec: QuantSpec
    device: torch.device

    def expert(self, number: int) -> reference.Expert:
        """Gate, up and down of the expert at a place of this rank."""
        hidden, inner = self.shape.hidden, self.shape.inner
        sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
        return reference.Expert(
            *(
                random_weight(*size, self.spec, self.device, seed=3 * number + side)
                for side, size in enumerate(sizes)
            )
        )

    @property
    def expert_map(self) -> torch.Tensor | None:
        """Where each expert of the model lies here; None where all do."""
        shape = self.shape
        if shape.count == shape.all_experts:
            return None
        places = torch.full((shape.all_experts,), -1, dtype=torch.int32, device=self.device)
        places[: shape.count] = torch.arange(shape.count, device=self.device)
        return places

    def draw(self, m: int, routing: str, seed: int) -> Draw:
        """`top_k` different experts for each of `m` tokens; popular ones are anywhere."""
        shape = self.shape
        generator = torch.Generator().manual_seed(seed)
        rank = torch.randperm(shape.all_experts, generator=generator) + 1.0
        uniform = torch.rand((m, shape.all_experts), generator=generator).clamp_(1e-12, 1 - 1e-7)
        # Adding Gumbel noise to log-probabilities draws without replacement.
        score = -ROUTINGS[routing] * rank.log() - (-uniform.log()).log()
        ids = score.topk(shape.top_k).indices
        weights = torch.rand((m, shape.top_k), generator=generator)
        here = ids[ids < shape.count]
        weights /= weights.sum(1, keepdim=True)
        moved = (ids.int().to(self.device), weights.to(self.device))
        return Draw(*moved, len(here.unique()), len(here))


def expected(
    layer: RandomExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The right answer in float64, for few tokens."""
    numbers = {number for number in ids.flatten().tolist() if number < layer.shape.count}
    known = {number: layer.expert(number) for number in numbers}
    return reference.experts(x, weights, ids, known)


def expert_bytes(spec: QuantSpec, shape: ExpertsShape) -> int:
    """Codes, scales and zero points of one expert, without any padding."""
    values = 3 * shape.hidden * shape.inner
    groups = 2 * shape.inner * -(-shape.hidden // spec.group_size)
    groups += shape.hidden * -(-shape.inner // spec.group_size)
    scale = spec.scale_dtype.itemsize + (spec.weight_type.bits / 8 if spec.has_zero_points else 0)
    return int(values * spec.weight_type.bits / 8 + groups * scale)


def floor_seconds(
    draw: Draw, shape: ExpertsShape, spec: QuantSpec, hbm: float, tensor: float
) -> float:
    """The least time: experts that were drawn, tokens and outputs moved once, or multiplied."""
    tokens = len(draw.ids)
    moved = draw.touched * expert_bytes(spec, shape) + 2 * 2 * tokens * shape.hidden
    flops = 2 * 3 * draw.slots * shape.hidden * shape.inner
    return max(moved / hbm, flops / tensor)


def rows_of(gate: LogicalWeight, up: LogicalWeight, field: str) -> torch.Tensor | None:
    """Rows of gate, then those of up."""
    first, second = getattr(gate, field), getattr(up, field)
    return None if first is None else torch.cat([first, second])
