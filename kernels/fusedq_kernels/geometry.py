"""How each layout pads K and where the groups fall in it; the layout modules own the rest."""

import functools
from dataclasses import dataclass
from math import gcd

BLOCK_K = 128
# The tiled layouts pad N to this.
BLOCK_N = 128
WNA16_ALIGNMENT = 32
# Output tiles that split-K can count at once (`cuda/arrivals.py`).
MAX_TILES = 16384


@dataclass(frozen=True, slots=True)
class GroupGeometry:
    """Where groups fall in the padded K of the tiled layouts.

    Padded position p holds input feature `p - pad` and belongs to group
    `(p + offset) // group_size`; each aligned run of `step` positions lies in one group.
    """

    step: int
    pad: int
    offset: int
    num_groups: int
    k_padded: int

    @property
    def first_step(self) -> int:
        """Steps of its group that lie before the first one stored."""
        return self.offset // self.step

    @property
    def last_group(self) -> int:
        """The highest group; steps made of padding alone may lie beyond it."""
        return self.num_groups - 1


@dataclass(frozen=True, slots=True)
class Wna16Geometry:
    """Padded K of CPU_WNA16: position p holds input feature `p - pad`.

    The operator derives the group size as `k_padded // num_groups`.
    """

    pad: int
    num_groups: int
    k_padded: int


def count_groups(k: int, group_size: int, phase: int) -> int:
    """Number of groups that `k` rows touch when row 0 is row `phase` of its group.

    Raises ValueError unless `k > 0` and `0 <= phase < group_size`.
    """
    if k <= 0:
        raise ValueError(f"k must be positive, got {k}")
    if not 0 <= phase < group_size:
        raise ValueError(f"phase {phase} is not inside a group of {group_size} rows")
    return -(-(k + phase) // group_size)


def group_geometry(k: int, group_size: int, phase: int) -> GroupGeometry:
    """Padding and group index of the tiled layouts; raises ValueError as `count_groups` does."""
    num_groups = count_groups(k, group_size, phase)
    if num_groups == 1:
        return GroupGeometry(BLOCK_K, 0, 0, 1, round_up(k, BLOCK_K))
    step = gcd(group_size, BLOCK_K)
    pad = phase % step
    return GroupGeometry(step, pad, phase - pad, num_groups, round_up(k + pad, BLOCK_K))


@functools.cache
def wna16_geometry(k: int, group_size: int, phase: int) -> Wna16Geometry:
    """Padding of the CPU_WNA16 layout.

    Raises ValueError as `count_groups` does, and for an odd group size with several groups.
    """
    num_groups = count_groups(k, group_size, phase)
    if num_groups == 1:
        return Wna16Geometry(0, 1, round_up(k, WNA16_ALIGNMENT))
    if group_size % 2:
        raise ValueError(f"layout CPU_WNA16 needs an even group size, got {group_size}")
    num_groups = round_up(num_groups, WNA16_ALIGNMENT // gcd(group_size, WNA16_ALIGNMENT))
    return Wna16Geometry(phase, num_groups, num_groups * group_size)


def whole_splits(num_blocks: int, split_k: int) -> int:
    """At most `split_k` splits of `num_blocks`, as many as leave none of them empty."""
    return -(-num_blocks // -(-num_blocks // split_k))


def most_blocks(num_slots: int, num_experts: int, block_m: int) -> int:
    """The most blocks of `block_m` positions that slots sorted by expert can fill.

    An expert's slots begin a block, and each expert that has any leaves `block_m - 1` positions of
    its last block empty at most.
    """
    touched = min(num_slots, num_experts)
    return (num_slots + touched * (block_m - 1)) // block_m


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
