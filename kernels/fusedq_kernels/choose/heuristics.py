"""Which tile a problem gets on a GPU: pure functions of plain data, the launches of triton-gemm.

`device.py` supplies the `DeviceSpec`; `cuda/` runs the `Launch`. Nothing here asks a driver, so the
answer given while planning is the answer at run time. `tiles.py` has the tiles of the rules,
`waves.py` picks one, `tuning.py` has the measured rows, which come before them; `refusals.py` says
which problems get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fusedq_kernels.choose import tuning, waves
from fusedq_kernels.choose.tiles import Rule, rules_for
from fusedq_kernels.choose.tuned_file import FUSED, SLICED
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, group_geometry, round_up, whole_splits
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    TILED_LAYOUTS,
    DeviceSpec,
    GemmShape,
    Launch,
    Policy,
    QuantSpec,
    TileConfig,
    WeightType,
)

# With 8 tokens Triton 3.6 chooses mma.sync where it has wgmma for more.
_MIN_INVARIANT_M = 16

# The split of a batch-invariant layer: about two 128-wide tiles per SM, each four K blocks long.
_INVARIANT_TILES_PER_SM = 2.1
_MIN_BLOCKS_PER_SPLIT = 4
_MAX_SPLIT_K = 16


class DeclaredLaunch(NamedTuple):
    """A launch of a declared kernel, and the fewest tokens that reach it."""

    min_tokens: int
    launch: Launch


def select(
    shape: GemmShape,
    spec: QuantSpec,
    device: DeviceSpec,
    policy: Policy = DEFAULT_POLICY,
    *,
    table_for: Callable[[DeviceSpec], tuning.TunedTable | None] = tuning.table_for,
) -> Launch:
    """The kernel and tile of a GPU for one problem that `catalogue.refusals` has passed.

    With a batch-invariant policy all that decides a row's bits is the same whatever batch it
    arrives in: K is cut at the same places, which N and K alone decide, the scale has one place,
    and there is one kind of tensor-core instruction. Measured rows, which `table_for` supplies and
    which otherwise come before the rules, promise none of this and are not asked.
    """
    batch_invariant = policy.batch_invariant
    table = None if batch_invariant else table_for(device)
    allowed = (FUSED, SLICED) if policy.sliced_prefill else (FUSED,)
    while table is not None:
        if (found := tuning.find(table, shape, spec, allowed)) is not None:
            return found
        table = table.beside
    step = group_geometry(shape.k, spec.group_size, 0).step
    rules = rules_for(device, TILED_LAYOUTS[spec.weight_type], step, batch_invariant)
    # Fewer tokens may run on another kind of tensor-core instruction.
    tokens = max(shape.m, _MIN_INVARIANT_M) if batch_invariant else shape.m
    rule = next(rule for rule in rules if rule.max_m is None or tokens <= rule.max_m)
    fitting = [c for c in rule.choices if c.suits(step) and tuning.divides(c.tile, shape.n)]
    tile = waves.pick(fitting, shape, spec.weight_type.bits, device)
    if batch_invariant:
        split = invariant_split(shape, device)
        many = shape.m > tuning.MAX_DECODE_M
        tile = replace(tile, split_k=1 if many else split, segments=split if many else 1)
    source = _rule_source(rules, rule, tile, batch_invariant)
    return Launch(FUSED, tile, f"{source}, compiled, never run" if device.kind == "hip" else source)


def tiles_for(
    device: DeviceSpec, weight_type: WeightType, step: int, batch_invariant: bool = False
) -> tuple[TileConfig, ...]:
    """Every tile of the rules for a GPU and a `GroupGeometry.step`, at `split_k` 1."""
    rules = rules_for(device, TILED_LAYOUTS[weight_type], step, batch_invariant)
    choices = (choice for rule in rules for choice in rule.choices)
    return tuple(dict.fromkeys(choice.tile for choice in choices if choice.suits(step)))


def reachable_launches(
    n: int,
    k: int,
    spec: QuantSpec,
    device: DeviceSpec,
    max_tokens: int,
    policy: Policy = DEFAULT_POLICY,
    *,
    table_for: Callable[[DeviceSpec], tuning.TunedTable | None] = tuning.table_for,
) -> tuple[tuple[int, Launch], ...]:
    """Every launch that `select` returns for 1 to `max_tokens` tokens, with the fewest tokens each.

    Launches that differ in `source` alone count once: what is compiled is the tile.
    """
    # Beyond 64 tokens a choice changes where another block_m begins, or a measured row.
    borders = _row_borders(table_for(device))
    borders |= {*range(1, tuning.MAX_DECODE_M + 1), *range(1, max_tokens + 1, 16)}
    found: dict[tuple[str, TileConfig | None], tuple[int, Launch]] = {}
    for m in sorted(border for border in borders if border <= max_tokens):
        launch = select(GemmShape(m, n, k), spec, device, policy, table_for=table_for)
        found.setdefault((launch.kernel, launch.tile), (m, launch))
    return tuple(found.values())


def declared_launch(
    n: int,
    k: int,
    spec: QuantSpec,
    device: DeviceSpec,
    policy: Policy = DEFAULT_POLICY,
    *,
    table_for: Callable[[DeviceSpec], tuning.TunedTable | None] = tuning.table_for,
) -> DeclaredLaunch | None:
    """What `select` names beside triton-gemm for some number of tokens."""
    if policy.batch_invariant or not policy.sliced_prefill:
        return None
    for m in sorted(_row_borders(table_for(device))):
        launch = select(GemmShape(m, n, k), spec, device, policy, table_for=table_for)
        if launch.kernel == SLICED:
            return DeclaredLaunch(m, launch)
    return None


def partial_sum_bytes(
    n: int,
    k: int,
    spec: QuantSpec,
    device: DeviceSpec,
    policy: Policy = DEFAULT_POLICY,
    *,
    table_for: Callable[[DeviceSpec], tuning.TunedTable | None] = tuning.table_for,
) -> int:
    """The most bytes of fp32 sums that the splits of one call store, whatever its tokens."""
    table = table_for(device)
    borders = {8, 16, 32, *range(64, tuning.OPEN_END + 1, 64)}
    borders |= {row.max_m for row in _rows(table)}
    tiles = {
        m: select(GemmShape(m, n, k), spec, device, policy, table_for=table_for).tile
        for m in borders
    }
    return max(4 * t.split_k * m * n if t and t.split_k > 1 else 0 for m, t in tiles.items())


def _row_borders(table: tuning.TunedTable | None) -> set[int]:
    """The fewest tokens that a measured row can serve, beside 1."""
    return {border for row in _rows(table) for border in (row.max_m + 1, row.min_m)}


def _rows(table: tuning.TunedTable | None) -> Iterator[tuning.TunedRow]:
    while table is not None:
        yield from table.rows
        table = table.beside


def _rule_source(rules: Sequence[Rule], rule: Rule, tile: TileConfig, batch_invariant: bool) -> str:
    tokens = f"m>{rules[-2].max_m}" if rule.max_m is None else f"m<={rule.max_m}"
    parts = [f"rule: {tokens}", f"{tile.block_m}x{tile.block_n}"]
    if tile.split_k > 1:
        parts.append(f"split {tile.split_k}")
    if tile.segments > 1:
        parts.append(f"segments {tile.segments}")
    if batch_invariant:
        parts.append("batch-invariant")
    return ", ".join(parts)


def invariant_split(shape: GemmShape, device: DeviceSpec) -> int:
    """From N and K alone."""
    tiles, num_blocks = round_up(shape.n, BLOCK_N) // BLOCK_N, -(-shape.k // BLOCK_K)
    split_k = 1
    while (
        2 * split_k * tiles <= _INVARIANT_TILES_PER_SM * device.num_sms
        and num_blocks >= _MIN_BLOCKS_PER_SPLIT * split_k
        and split_k < _MAX_SPLIT_K
    ):
        split_k *= 2
    return whole_splits(num_blocks, split_k)
