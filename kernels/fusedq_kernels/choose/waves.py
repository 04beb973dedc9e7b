"""Which of a rule's tiles fills the GPU, and how many splits of K pay for their sums.

Programs of one launch run in waves: each multiprocessor (SM) takes as many at once as its registers
and shared memory hold. A tile is worth its width only where the last wave is not mostly empty, and
K is split only to fill the first one. The constants are those that lose least against the measured
tiles of an H200 (benchmarks/best_tiles.py); what they say of waves and of sums holds for any GPU.
"""

from collections.abc import Iterable
from dataclasses import replace

from fusedq_kernels.choose.tiles import Choice
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, round_up, whole_splits
from fusedq_kernels.types import DeviceSpec, GemmShape, TileConfig

# Waves less full than this cost more than a narrower tile does.
_FULL = 0.7
# Bytes of partial sums, written and read, per byte of packed weight: more cost more than they gain.
# Where programs take a part of their places only, the weight takes longer, and sums matter less.
_SUM_SHARE = 0.6
_BYTES_PER_SUM = 4 + 4
_MIN_BLOCKS_PER_SPLIT = 4
_MAX_SPLIT_K = 16
# 16 MiB of 16-bit tokens of 4096 features. On an H200 8192 tokens took 8 % less time in groups of
# this many, and 2048 as long as without.
GROUP_TOKENS = 2048


def pick(
    choices: Iterable[Choice], shape: GemmShape, weight_bits: int, device: DeviceSpec
) -> TileConfig:
    """The first tile whose waves are full enough, else the last one, with its `split_k`.

    `choices` are those that suit the weight, the widest first.
    """
    choice, split_k = None, 1
    for choice in choices:
        split_k = split_for(choice, shape, weight_bits, device) if choice.may_split else 1
        programs = _tiles(choice.tile, shape) * split_k
        if fullness(programs, choice.per_sm * device.num_sms) >= _FULL:
            break
    assert choice is not None, "a rule has a tile for every weight"
    return choice.tile if split_k == 1 else replace(choice.tile, split_k=split_k)


def split_for(choice: Choice, shape: GemmShape, weight_bits: int, device: DeviceSpec) -> int:
    """The most splits of K that fit one wave, have enough blocks each, and pay for their sums."""
    num_blocks = -(-shape.k // BLOCK_K)
    programs, places = _tiles(choice.tile, shape), choice.per_sm * device.num_sms
    # Per output; what is masked off in a tile is not stored, but the tile takes as long.
    sum_bytes = _BYTES_PER_SUM * round_up(shape.m, choice.tile.block_m)
    weight_bytes = shape.k * weight_bits / 8

    def pays(split_k: int) -> bool:
        taken = split_k * programs
        return (
            taken <= places
            and split_k * _MIN_BLOCKS_PER_SPLIT <= num_blocks
            and split_k * sum_bytes * taken <= _SUM_SHARE * weight_bytes * places
        )

    split_k = 1
    while split_k < _MAX_SPLIT_K and pays(2 * split_k):
        split_k *= 2
    return whole_splits(num_blocks, split_k)


def fullness(programs: int, places: int) -> float:
    """The share of their places that the waves of `programs` take."""
    waves = -(-programs // places) if places else 0
    return programs / (waves * places) if waves else 1.0


def _tiles(tile: TileConfig, shape: GemmShape) -> int:
    return -(-shape.m // tile.block_m) * (round_up(shape.n, BLOCK_N) // tile.block_n)


def group_tiles(block_m: int) -> int:
    """Token tiles that walk over the outputs together.

    Of more than GROUP_TOKENS tokens x does not stay in L2 until the next output tile.
    """
    return max(1, GROUP_TOKENS // block_m)
