"""Which tiles the experts of a layer get on a GPU: pure functions of plain data.

What counts is not the number of tokens but how many of them meet at an expert. That is known from
its mean alone, because a launch must serve any routing: of `E` experts a token asks `top_k`, so `m`
tokens are expected to touch `E * (1 - (1 - top_k / E) ** m)` of them, and those that a rank does
not hold change nothing about the rows of one that it does. Tiles are those of one weight
(`tiles.py`), chosen by `waves.py` as if the touched experts were one weight, behind each other
along N.

No GPU has measured any of it yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import NamedTuple

from fusedq_kernels.call import Call, ExpertsCall, Stacks
from fusedq_kernels.choose import tuning, waves
from fusedq_kernels.choose.heuristics import invariant_split
from fusedq_kernels.choose.tiles import Choice, rules_for
from fusedq_kernels.geometry import (
    BLOCK_N,
    MAX_TILES,
    group_geometry,
    most_blocks,
    round_up,
)
from fusedq_kernels.types import TILED_LAYOUTS, DeviceSpec, GemmShape, TileConfig, WeightType

FEW_SLOTS, CHUNK_SLOTS = 64, 512
"""Slots that one program of `cuda/routing.py` sorts: of few of them it has fewer warps."""

# So many of the standard deviation of an expert's rows fit its block beside their mean: a second
# block decodes the expert's weight again.
_SPREAD = 1.5
# A block of more rows is half empty too often, until an expert fills some of them.
_WIDEST = 128
_FILLS_WIDER = 512
# Sums and scales as for any number of tokens, one kind of tensor-core instruction.
_INVARIANT_BLOCKS = range(16, tuning.MAX_DECODE_M + 1)
# Of all tiles.
_NARROWEST = 64
# One pass keeps what lies between the products for so many slots, or rows of each expert.
_PASS_SLOTS = 32768
_PASS_ROWS = 128


@dataclass(frozen=True, slots=True)
class Load:
    """`tokens` that each ask `top_k` of `all_experts`, those of a layer on all ranks together."""

    tokens: int
    top_k: int
    all_experts: int

    @property
    def touched(self) -> float:
        """The share of the experts that is expected to get a token."""
        return 1 - (1 - min(self.top_k / self.all_experts, 1.0)) ** self.tokens

    @property
    def rows(self) -> float:
        """Tokens expected of an expert that gets any."""
        return self.tokens * self.top_k / (self.all_experts * self.touched)


@dataclass(frozen=True, slots=True)
class ExpertsLaunch:
    """Tiles of the way up and the way down, of one `block_m`; `source` says why."""

    up: TileConfig
    down: TileConfig
    source: str

    @property
    def block_m(self) -> int:
        return self.up.block_m


class Served(NamedTuple):
    """A launch, and the fewest and the most tokens that it serves."""

    tokens: int
    most: int
    launch: ExpertsLaunch


def pass_tokens(count: int, top_k: int) -> int:
    """The most tokens that one pass over the `count` experts of a rank takes.

    What a pass keeps between its products grows with its tokens; enough of them to fill wide tiles
    of every expert lose nothing.
    """
    return max(1, max(_PASS_SLOTS, _PASS_ROWS * count) // top_k)


def select(call: ExpertsCall | Stacks, load: Load, device: DeviceSpec) -> ExpertsLaunch:
    """The tiles of one pass over a layer's experts, for problems that `catalogue.refusals` passed.

    Numbers of tokens between two of `_rung` get the tiles of the upper one, so that few launches
    serve any number. With a batch-invariant policy K is cut at the same places for any number of
    tokens, which N, K, `top_k` and the numbers of experts decide alone.
    """
    load = replace(load, tokens=_rung(min(load.tokens, pass_tokens(call.count, load.top_k))))
    known = [_choices(each, device) for each in (call.up, call.down)]
    if call.up.policy.batch_invariant:
        return _invariant(call, known, load, device)
    block_m = _block_m(load, [each for each in known[0] if each in known[1]])
    up, down = (
        _pick(of, choices[block_m], call, load, device)
        for of, choices in zip((call.up, call.down), known, strict=True)
    )
    return _launch(up, down, load, "")


def reachable(
    call: ExpertsCall | Stacks, top_k: int, all_experts: int, device: DeviceSpec, max_tokens: int
) -> tuple[Served, ...]:
    """Every launch of `select` for 1 to `max_tokens` tokens.

    Launches that differ in `source` alone count once, but again with more tokens where their slots
    are sorted by other kernels.
    """
    found: dict[object, Served] = {}
    most = min(max_tokens, pass_tokens(call.count, top_k))
    sorting = (1, FEW_SLOTS // top_k, CHUNK_SLOTS // top_k)
    first = 1
    for last in sorted({*rungs(most), *(each for each in sorting if 0 < each < most)}):
        launch = select(call, Load(last, top_k, all_experts), device)
        kind = sum(first > border for border in sorting)
        key = (launch.up, launch.down, kind)
        found[key] = found.get(key, Served(first, last, launch))._replace(most=last)
        first = last + 1
    return tuple(found.values())


def _rung(tokens: int) -> int:
    """The next power of two, or three quarters of one, that is not below `tokens`."""
    power = 1 << (tokens - 1).bit_length()
    return power * 3 // 4 if power > 2 and tokens <= power * 3 // 4 else power


def rungs(max_tokens: int) -> list[int]:
    """What numbers of tokens up to `max_tokens` are rounded to; the last one is `max_tokens`."""
    rungs, tokens = [], 1
    while (rung := _rung(tokens)) < max_tokens:
        rungs.append(rung)
        tokens = rung + 1
    return [*rungs, max_tokens]


def choices_by_block(
    device: DeviceSpec, weight_type: WeightType, step: int, batch_invariant: bool
) -> dict[int, list[Choice]]:
    """By `block_m` the tiles of experts with groups of `GroupGeometry.step`, widest first.

    Exact ones wherever there are any: an expert of few tokens among many is one of few tokens.
    """
    found: dict[int, list[Choice]] = {}
    for rule in rules_for(device, TILED_LAYOUTS[weight_type], step, batch_invariant):
        for choice in rule.choices:
            if choice.suits(step):
                # Experts of many tokens each are many programs, and their sums many bytes.
                may_split = choice.may_split and choice.tile.block_m <= tuning.MAX_DECODE_M
                told = replace(choice, may_split=may_split)
                found.setdefault(choice.tile.block_m, []).append(told)
    for block_m, choices in found.items():
        exact = [each for each in choices if not each.tile.scale_weights]
        unique = dict.fromkeys(exact or choices)
        found[block_m] = sorted(unique, key=lambda each: -each.tile.block_n)
    return found


def in_order_tile(device: DeviceSpec, weight_type: WeightType, step: int) -> TileConfig:
    """The tile that adds up the parts of K by itself, in a batch-invariant layer."""
    (choice,) = rules_for(device, TILED_LAYOUTS[weight_type], step, True)[-1].choices
    return choice.tile


def _step(of: Call) -> int:
    return group_geometry(of.k, of.spec.group_size, of.phase).step


def _choices(of: Call, device: DeviceSpec) -> dict[int, list[Choice]]:
    """Those whose width divides the weight's."""
    known = choices_by_block(device, of.spec.weight_type, _step(of), of.policy.batch_invariant)
    fitting = {
        block_m: [each for each in choices if tuning.divides(each.tile, of.n)]
        for block_m, choices in known.items()
    }
    return {block_m: choices for block_m, choices in fitting.items() if choices}


def _block_m(load: Load, known: list[int]) -> int:
    """The smallest block that most experts need one of."""
    wanted = load.rows + _SPREAD * sqrt(load.rows)
    widest = max(known) if load.rows >= _FILLS_WIDER else _WIDEST
    fitting = sorted(each for each in known if each <= widest)
    return next((each for each in fitting if each >= wanted), fitting[-1])


def _pick(
    of: Call, choices: list[Choice], call: ExpertsCall | Stacks, load: Load, device: DeviceSpec
) -> TileConfig:
    """One weight's tile and splits, for as many blocks as are expected."""
    block_m = choices[0].tile.block_m
    blocks = ceil(call.count * load.touched * max(1.0, load.rows / block_m))
    shape = GemmShape(block_m, blocks * round_up(of.n, BLOCK_N), of.k)
    tile = waves.pick(choices, shape, of.spec.weight_type.bits, device)
    return tile if _can_count(tile, of, call, load) else replace(tile, split_k=1)


def _can_count(tile: TileConfig, of: Call, call: ExpertsCall | Stacks, load: Load) -> bool:
    """Whether there are arrival counters for all tiles that there can be."""
    blocks = most_blocks(load.tokens * load.top_k, call.count, tile.block_m)
    return blocks * (round_up(of.n, BLOCK_N) // tile.block_n) <= MAX_TILES


def _invariant(
    call: ExpertsCall | Stacks, known: list[dict[int, list[Choice]]], load: Load, device: DeviceSpec
) -> ExpertsLaunch:
    sides = (call.up, call.down)
    parts = [_invariant_parts(of, call, load, device) for of in sides]
    in_order = [in_order_tile(device, of.spec.weight_type, _step(of)) for of in sides]
    if in_order[0].block_m != in_order[1].block_m:
        parts = [1, 1]
    if load.tokens > tuning.MAX_DECODE_M and max(parts) > 1:
        up, down = (
            replace(tile, segments=count) for tile, count in zip(in_order, parts, strict=True)
        )
    else:
        if max(parts) > 1:
            known = [_that_split(choices) for choices in known]
        blocks = [each for each in known[0] if each in known[1] and each in _INVARIANT_BLOCKS]
        block_m = _block_m(load, blocks)
        up, down = (
            replace(_pick(of, choices[block_m], call, load, device), split_k=count)
            for of, choices, count in zip(sides, known, parts, strict=True)
        )
    return _launch(up, down, load, ", batch-invariant")


def _that_split(known: dict[int, list[Choice]]) -> dict[int, list[Choice]]:
    splitting = {
        block_m: [each for each in choices if each.may_split] for block_m, choices in known.items()
    }
    return {block_m: choices for block_m, choices in splitting.items() if choices}


def _invariant_parts(of: Call, call: ExpertsCall | Stacks, load: Load, device: DeviceSpec) -> int:
    """How often K is cut for any number of tokens: as if one token's experts were one weight."""
    chosen = max(1, load.top_k * call.count // load.all_experts)
    outputs = round_up(of.n, BLOCK_N)
    parts = invariant_split(GemmShape(1, chosen * outputs, of.k), device)
    most = most_blocks(tuning.MAX_DECODE_M * load.top_k, call.count, _INVARIANT_BLOCKS[0])
    return parts if most * (outputs // _NARROWEST) <= MAX_TILES else 1


def _launch(up: TileConfig, down: TileConfig, load: Load, suffix: str) -> ExpertsLaunch:
    # The tensor memory accelerator fetches neighbouring rows, which tokens of an expert are not.
    up = replace(up, x_descriptor=False)
    names = (
        f"{tile.block_n} wide"
        + (f" in {parts}" if (parts := tile.split_k * tile.segments) > 1 else "")
        for tile in (up, down)
    )
    tokens = f"rule: {load.rows:.1f} tokens an expert, blocks of {up.block_m}"
    return ExpertsLaunch(up, down, f"{tokens}, {', '.join(names)}{suffix}")
