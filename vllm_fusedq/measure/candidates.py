"""Launches worth measuring for a problem, and the tuned rows that measurements add up to."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.heuristics import select, tiles_for
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, group_geometry, round_up, whole_splits
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    QuantSpec,
    TileConfig,
    WeightType,
)
from vllm_fusedq.measure.roofline import Rates, roofline

# Rows are measured at the largest number of tokens that they serve.
DECODE_BUCKETS = (8, 16, 32, 64)
PREFILL_BUCKETS = (128, 512, 2048, 8192)
# From here on slices through cuBLAS are measured beside the tiles.
MIN_SLICED_M = 512
AUDITED_STAGES, NEAR_STAGES = (0,), (-1, 0, 1)
TILE_FIELDS = tuple(field.name for field in fields(TileConfig))

_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_MIN_BLOCKS_PER_SPLIT = 2
_MAX_STAGES = 6


@dataclass(frozen=True)
class Measurement:
    """Microseconds of one launch on one problem; a kernel without a tile has none."""

    shape: GemmShape
    spec: QuantSpec
    tile: TileConfig | None
    us: float
    kernel: str = "triton-gemm"


def candidates(
    shape: GemmShape,
    spec: QuantSpec,
    device: DeviceSpec,
    rates: Rates,
    keep: int,
    more_stages: Sequence[int] = AUDITED_STAGES,
) -> list[TileConfig]:
    """The `keep` tiles with the shortest predicted times, what the rules choose before all others.

    The tiles are those of the rules, which are known to compile without spills, with so many stages
    more or less and every sensible split of K. Of twice and half the splits that the rules choose
    at least one tile stays. The audit covers the rules' own stages and every split.
    """
    chosen = select(shape, spec, device, table_for=lambda _: None).tile
    assert chosen is not None
    step = group_geometry(shape.k, spec.group_size, 0).step
    found = {chosen}
    for tile in tiles_for(device, spec.weight_type, step):
        if not _suits(tile, shape):
            continue
        for split_k in splits_for(shape.k):
            for stages in (tile.num_stages + more for more in more_stages):
                if 2 <= stages <= _MAX_STAGES:
                    found.add(replace(tile, split_k=split_k, num_stages=stages))

    def predicted(tile: TileConfig) -> float:
        return roofline(shape, spec, device, tile, rates).seconds

    ranked = sorted(found - {chosen}, key=lambda tile: (predicted(tile), repr(tile)))
    best_of_split = {tile.split_k: tile for tile in reversed(ranked)}
    near = [best_of_split[s] for s in _neighbours(chosen.split_k) if s in best_of_split]
    return list(dict.fromkeys((chosen, *near, *ranked)))[:keep]


def splits_for(k: int) -> list[int]:
    """Splits of K that leave no split empty and each at least two blocks."""
    blocks = -(-k // BLOCK_K)
    return [
        split
        for split in _SPLITS
        if whole_splits(blocks, split) == split and blocks >= _MIN_BLOCKS_PER_SPLIT * split
    ] or [1]


def tuned_rows(measurements: Iterable[Measurement]) -> list[tuning.TunedRow]:
    """The fastest tile of each problem, as rows of a tuned table.

    Shapes without a row for `MAX_DECODE_M` are not finished and left out. Where sliced-cublas is
    the fastest it gets a row beside that of the fastest tile, which serves where it is forbidden.
    """
    shapes: dict[tuple[WeightType, int, int, int], list[Measurement]] = {}
    for each in measurements:
        key = (each.spec.weight_type, each.spec.group_size, each.shape.n, each.shape.k)
        shapes.setdefault(key, []).append(each)
    rows = []
    for key, members in shapes.items():
        if all(each.tile is None or each.shape.m != tuning.MAX_DECODE_M for each in members):
            continue
        fused_until = 0
        for m in sorted({each.shape.m for each in members}):
            ranked = sorted((e for e in members if e.shape.m == m), key=lambda each: each.us)
            fused = next((each for each in ranked if each.tile is not None), None)
            if fused is None:
                continue
            rows.append(tuning.TunedRow(*key, m, fused.kernel, fused.tile, fused.us))
            if ranked[0] is fused:
                fused_until = m
                continue
            # Half-way, in factors, from the last number of tokens at which a tile was faster.
            min_m = math.isqrt(fused_until * m) + 1
            rows.append(tuning.TunedRow(*key, m, ranked[0].kernel, None, ranked[0].us, min_m))
            fused_until = 0
    return rows


def _suits(tile: TileConfig, shape: GemmShape) -> bool:
    if tile.scale_weights and shape.m <= tuning.MAX_DECODE_M:
        return False  # Decoding keeps weights exact.
    divides = round_up(shape.n, BLOCK_N) % tile.block_n == 0
    return divides and min(64, shape.m) <= tile.block_m <= max(8, 2 * shape.m)


def _neighbours(split: int) -> tuple[int, ...]:
    return (split, 2 * split, split // 2)
