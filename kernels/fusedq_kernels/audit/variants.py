"""Every variant of the main kernel that `heuristics.select` can have launched on a kind of GPU.

From the rules, not from launches: each tile of each rule and of each packaged measured row, with
and without a bias, whole, split and in segments, for every weight type, dtype and kind of group.
What differs in a number alone is there in few of them:

- groups of one step, of twice (128 only: of the smaller steps a group holds an odd number) and of
  three times as many rows, for every step, and one group per channel. The number of steps divides
  an index: by nothing, a shift, or a multiplication.
- 1, 2 and 16 splits or segments. Of 3 and more the loop is one code with another count, and the
  final sum of a small tile unrolled to that count.

`standing_for` is the variant that a launch is audited as.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fusedq_kernels.audit.compile import AUDIT_K, audited_groups
from fusedq_kernels.audit.fused import Variant
from fusedq_kernels.call import SCALED_BY_ROWS, SCALES_OF
from fusedq_kernels.catalogue import TRITON_GEMM, refusals
from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import KNOWN_DEVICES
from fusedq_kernels.choose.heuristics import tiles_for
from fusedq_kernels.choose.tiles import rules_for
from fusedq_kernels.cuda import gemm
from fusedq_kernels.geometry import BLOCK_K, group_geometry
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    DeviceSpec,
    QuantSpec,
    TileConfig,
    WeightType,
)

STEPS = (8, 16, 32, 64, 128)
COUNTS = (1, 2, 16)


def group_sizes() -> tuple[int, ...]:
    """One of each kind; that per channel is `AUDIT_K`."""
    sizes = [step * times for step in STEPS for times in (1, 2, 3)]
    return (*sorted({size for size in sizes if size % BLOCK_K or size >= BLOCK_K}), AUDIT_K)


def launchable(device: DeviceSpec) -> tuple[Variant, ...]:
    """Every one for the GPUs of a device's compute capability; of equal binaries the first."""
    found: dict[object, Variant] = {}
    for each in _all(device):
        found.setdefault(each.key(), each)
    return tuple(found.values())


def _all(device: DeviceSpec) -> Iterator[Variant]:
    for spec in specs(device):
        for tile in _tiles(device, spec):
            for act_dtype in gemm.ACT_DTYPES:
                for has_bias in (True, False):
                    yield Variant(tile, spec, act_dtype, has_bias)


def specs(device: DeviceSpec) -> Iterator[QuantSpec]:
    """Every scheme that runs there, with groups of each kind."""
    for weight_type in WeightType:
        for group_size in group_sizes():
            for scale_dtype in SCALES_OF[weight_type]:
                by_rows = scale_dtype in SCALED_BY_ROWS
                spec = QuantSpec(weight_type, group_size, scale_dtype, by_rows)
                if not refusals(TRITON_GEMM, 128, AUDIT_K, spec, 0):
                    yield spec


def _tiles(device: DeviceSpec, spec: QuantSpec) -> Iterator[TileConfig]:
    """The tiles of a scheme, with every number of splits and, where it can be, of segments."""
    step = audited_groups(spec).step
    chosen = {
        *tiles_for(device, spec.weight_type, step),
        *_measured(device, spec.weight_type, step),
    }
    for tile in sorted(chosen, key=repr):
        for count in COUNTS:
            yield replace(tile, split_k=count)
    for tile in tiles_for(device, spec.weight_type, step, batch_invariant=True):
        for count in COUNTS:
            yield replace(tile, split_k=count)
    layout = TILED_LAYOUTS[spec.weight_type]
    for choice in rules_for(device, layout, step, True)[-1].choices:
        for count in COUNTS:
            yield replace(choice.tile, segments=count)


def _measured(device: DeviceSpec, weight_type: WeightType, step: int) -> Iterator[TileConfig]:
    """The tiles of packaged rows, of all boards of that capability."""
    for board in KNOWN_DEVICES.values():
        table = tuning.packaged(board) if board.capability == device.capability else None
        for row in table.rows if table else ():
            if row.tile and (row.weight_type, row.step) == (weight_type, step):
                yield replace(row.tile, split_k=1)


def standing_for(
    tile: TileConfig, spec: QuantSpec, k: int, phase: int, act_dtype: torch.dtype, has_bias: bool
) -> Variant:
    """The variant that a launch on a rank's weight with `k` rows from `phase` on is audited as."""
    groups = group_geometry(k, spec.group_size, phase)
    steps = spec.group_size // groups.step
    if groups.num_groups == 1:
        group_size = AUDIT_K
    elif steps & (steps - 1):
        group_size = 3 * groups.step
    else:
        group_size = min(steps, 2) * groups.step
    return Variant(
        replace(tile, split_k=_count(tile.split_k), segments=_count(tile.segments)),
        replace(spec, group_size=group_size),
        act_dtype,
        has_bias,
    )


def _count(splits: int) -> int:
    return min(splits, 2) if splits < 3 else COUNTS[-1]
