"""Compares what a launch of a layer's experts computes on this device with plain PyTorch.

As `guard.py` does for one weight: whole passes, routing and the sum over choices included, twice,
and every output of every token against float64 within what rounding explains. Tokens choose in two
ways: each other experts, so that all of them have a turn, those of other ranks too; and all the
same ones, so that blocks are full and an expert has several of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from fusedq_kernels import guard, reference
from fusedq_kernels.activation import Activation
from fusedq_kernels.experts import ResidentExperts
from fusedq_kernels.layouts.stacked import apart
from fusedq_kernels.types import PackedWeight
from fusedq_kernels.warmup import ReachedExperts

# Of an activation in fp32: some steps, and exponentials and quotients of a few units.
_CURVE = 2.0**-20


@dataclass(frozen=True, slots=True)
class Choices:
    """What each token asks, as calls pass it: fp32 and int32 `[tokens, top_k]`, and the map."""

    weights: torch.Tensor
    ids: torch.Tensor
    places: torch.Tensor | None

    @property
    def held(self) -> torch.Tensor:
        """Where each expert lies on this rank, -1 where it does not."""
        return self.ids.long() if self.places is None else self.places.long()[self.ids.long()]


@dataclass(frozen=True, slots=True)
class Sums:
    """Of each output, `[tokens, N]` in float64, what the choices of a token add up to.

    Attributes:
        sums: the outputs themselves.
        rows: the sizes of the rows that are added, infinite where one is too large for the dtype.
        spread: as `guard.Truth`'s of the product by w2.
        inner: the spread where what lies between the products is rounded once.
        adding: the spread where the sums of the product by w13 are fp32's, and so the activation.
        scaled_up, scaled_down: the spread where scaled weights are rounded, of w13 and of w2.
    """

    sums: torch.Tensor
    rows: torch.Tensor
    spread: torch.Tensor
    inner: torch.Tensor
    adding: torch.Tensor
    scaled_up: torch.Tensor
    scaled_down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Truth:
    """Some tokens `[tokens, H]`, what they choose, and what comes of it, whatever the launch."""

    x: torch.Tensor
    choices: Choices
    sums: Sums

    @classmethod
    def of(cls, resident: ResidentExperts, choices: Choices) -> Truth:
        """Computed on the device of the weights, one expert at a time; the seed is fixed."""
        call, device = resident.call, resident.w13.qweight.device
        generator = torch.Generator().manual_seed(0)
        size = (len(choices.ids), call.up.in_features)
        x = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        x = x.to(device, call.up.dtype.torch)
        totals = Sums(
            *(
                torch.zeros((len(x), call.down.n), dtype=torch.float64, device=device)
                for _ in fields(Sums)
            )
        )
        held = choices.held
        for place in held.unique().tolist():
            if place < 0:
                continue
            tokens, nth = (held == place).nonzero(as_tuple=True)
            shares = choices.weights[tokens, nth, None].double()
            found = _of_expert(resident, place, x[tokens])
            for field in fields(Sums):
                total, part = getattr(totals, field.name), getattr(found, field.name)
                total.index_add_(0, tokens, shares * part)
        return cls(x, choices, totals)


def truths(resident: ResidentExperts) -> tuple[Truth, ...]:
    """Of tokens that choose in both ways."""
    return tuple(Truth.of(resident, each) for each in choices(resident))


def choices(resident: ResidentExperts) -> tuple[Choices, Choices]:
    """What tokens choose in both ways: all experts in turn, and all the same ones."""
    asked, tokens = resident.all_experts, guard.TOKENS
    top_k, device = resident.top_k, resident.w13.qweight.device
    generator = torch.Generator().manual_seed(1)
    all_have_a_turn = max(tokens, -(-asked // top_k))
    order = torch.randperm(asked, generator=generator, device="cpu")
    apart_ids = order[torch.arange(all_have_a_turn * top_k, device="cpu").view(-1, top_k) % asked]
    places = None
    if resident.places is not None:
        # Any map will do: the last ones are this rank's
        places = torch.arange(asked, dtype=torch.int32, device="cpu") - (
            asked - resident.call.count
        )
        places = places.clamp_(min=-1).to(device)
    turns = torch.arange(tokens, device="cpu")[:, None] + torch.arange(top_k, device="cpu")
    same_ids = asked - top_k + turns % top_k

    def chosen(ids: torch.Tensor) -> Choices:
        weights = torch.rand(ids.shape, generator=generator, dtype=torch.float32, device="cpu")
        weights = (weights + 0.1) / (weights + 0.1).sum(1, keepdim=True)
        return Choices(weights.to(device), ids.to(device, torch.int32), places)

    return chosen(apart_ids), chosen(same_ids)


def check(
    reached: ReachedExperts, resident: ResidentExperts, known: tuple[Truth, ...]
) -> guard.Difference | None:
    """Run one launch twice with its fewest tokens and with a block of them; None if right.

    `known` are the `resident` experts' `truths`.
    """
    full = min(reached.most, max(reached.tokens, reached.launch.block_m))
    found = (
        _check_tokens(reached, resident, truth, tokens)
        for tokens in sorted({reached.tokens, full})
        for truth in known
    )
    return next(filter(None, found), None)


def _check_tokens(
    reached: ReachedExperts, resident: ResidentExperts, truth: Truth, tokens: int
) -> guard.Difference | None:
    call, choices = resident.call, truth.choices
    at = torch.arange(tokens, device=truth.x.device) % len(truth.x)
    x = truth.x[at]
    operands = (x, choices.weights[at], choices.ids[at], choices.places)
    run = resident.kernel.prepare_expert_pass(call, reached.launch, resident.top_k)
    memory = guard.untouched(x, call.down.n)
    for each in memory:
        run(*operands, resident.w13, resident.w2, each[:tokens])
    allowed = tolerance(reached, resident, truth, tokens * call.down.n)
    return guard.difference(reached, memory, tokens, truth.sums.sums, allowed)


def tolerance(
    reached: ReachedExperts, resident: ResidentExperts, truth: Truth, outputs: int
) -> torch.Tensor:
    """By how much each output of a launch may differ from `truth.sums.sums`, `[tokens, N]`."""
    launch = reached.launch
    scaled = launch.up.scale_weights, launch.down.scale_weights
    return allowance(resident, truth, outputs, scaled)


def allowance(
    resident: ResidentExperts, truth: Truth, outputs: int, scaled: tuple[bool, bool]
) -> torch.Tensor:
    """`tolerance` of what rounds scaled weights of w13 and of w2, or does not.

    As `guard.tolerance`: what lies between the products is rounded once and so is each row of the
    second, their sum once more; errors of many features add up at random.
    """
    limits, known = torch.finfo(truth.x.dtype), truth.sums
    half_unit, single = limits.eps / 2, torch.finfo(torch.float32).eps
    at_random = known.inner + known.adding
    for rounds, spread in zip(scaled, (known.scaled_up, known.scaled_down), strict=True):
        if rounds:
            at_random = at_random + spread
    allowed = at_random * guard.spreads(outputs)
    allowed += known.spread * guard.adding(resident.call.down.k)
    allowed += (known.rows + known.sums.abs()) * half_unit + known.rows * resident.top_k * single
    shares = truth.choices.weights.double().sum(1, keepdim=True)
    allowed += (1 + shares) * limits.smallest_normal * half_unit
    allowed *= 1 + limits.eps
    return allowed.masked_fill_(known.sums.abs() + allowed >= limits.max, torch.inf)


def _of_expert(resident: ResidentExperts, place: int, x: torch.Tensor) -> Sums:
    """What one expert makes of tokens, each at weight one."""
    call, dtype = resident.call, x.dtype
    limits = torch.finfo(dtype)
    half_unit, smallest = limits.eps / 2, limits.smallest_normal
    up, down = resident.expert(place)
    bias_up, bias_down = (
        None if stack.bias is None else stack.bias[place].double()
        for stack in (resident.w13, resident.w2)
    )
    first = guard.Truth.of_tokens(_ordered(x, up), x.new_zeros(up.n), guard.weights_of(up, dtype))
    sums = first.sums if bias_up is None else first.sums + bias_up
    hidden = _activated(call.activation, sums)
    curve = _CURVE * (sums.abs() + abs(call.activation.alpha) + (call.activation.limit or 0))
    variances = (
        hidden.square(),
        (hidden.abs().clamp(min=smallest) * half_unit).square(),
        _moved(call.activation, sums, first.spread * guard.adding(up.k) + curve),
        _moved(call.activation, sums, first.rounding),
    )
    features, squares = _ordered(hidden, down), [_ordered(each, down) for each in variances]
    found: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for weight in guard.weights_of(down, dtype):
        found[0].append(features @ weight.t())
        weight = weight.square()
        for into, each in zip(found[1:5], squares, strict=True):
            into.append((each @ weight.t()).sqrt_())
        weight.clamp_(min=smallest**2).mul_(half_unit**2)
        found[5].append((squares[0] @ weight.t()).sqrt_())
    y, spread, inner, adding, scaled_up, scaled_down = (torch.cat(each, dim=1) for each in found)
    y = y if bias_down is None else y + bias_down
    too_large = (hidden.abs().amax(1, keepdim=True) >= limits.max / 2) | (y.abs() >= limits.max / 2)
    rows = y.abs().masked_fill(too_large, torch.inf)
    return Sums(y, rows, spread, inner, adding, scaled_up, scaled_down)


def _ordered(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return x if weight.perm is None else x[:, weight.perm.long()]


def _activated(
    activation: Activation,
    sums: torch.Tensor,
    off: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The activation of outputs `[M, N]` of w13, of which gates and others are `off` by so much."""
    gate, up = _sides(activation, sums)
    if off is not None:
        gate, up = gate + off[0], up + off[1]
    return reference.activate(activation, gate, up)


def _moved(activation: Activation, sums: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """The variance of the activation where each of its arguments is off, up or down."""
    exact, (gate, up) = _activated(activation, sums), _sides(activation, off)
    nothing = torch.zeros_like(gate)
    moves = [(gate, nothing), (-gate, nothing), (nothing, up), (nothing, -up)]
    by = [(_activated(activation, sums, move) - exact).abs() for move in moves]
    return torch.maximum(*by[:2]).square() + torch.maximum(*by[2:]).square()


def _sides(activation: Activation, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and others of `[M, N]` that alternate; twice the same where there are no pairs."""
    if not activation.is_gated:
        return values, values
    gate, up = apart(values)
    return gate.flatten(1), up.flatten(1)
