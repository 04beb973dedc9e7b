"""What the experts of a layer allocate on a GPU beside tokens and outputs: plain arithmetic."""

from __future__ import annotations

from fusedq_kernels.call import Call, ExpertsCall, Stacks
from fusedq_kernels.choose.experts import (
    CHUNK_SLOTS,
    ExpertsLaunch,
    Load,
    pass_tokens,
    rungs,
    select,
)
from fusedq_kernels.geometry import most_blocks
from fusedq_kernels.types import DeviceSpec, TileConfig

_WORD = 4
# A histogram is of no fewer places than a warp has threads.
_MIN_BINS = 32


def scratch_bytes(
    call: ExpertsCall | Stacks,
    launch: ExpertsLaunch,
    load: Load,
    ordered: tuple[bool, bool] = (False, False),
) -> int:
    """What one pass allocates beside tokens and outputs, at its largest moment.

    `ordered` says whether each expert reads its features in an order of its own, up and down.
    """
    slots = load.tokens * load.top_k
    blocks = most_blocks(slots, call.count, launch.block_m)
    positions = blocks * launch.block_m
    tables = _WORD * (positions + blocks + counted_words(slots, call.count))
    inner, outer = 2 * positions * call.down.in_features, 2 * slots * call.down.n
    up, down = (
        _sum_bytes(tile, slots, of) + (2 * positions * of.k if is_ordered else 0)
        for of, tile, is_ordered in (
            (call.up, launch.up, ordered[0]),
            (call.down, launch.down, ordered[1]),
        )
    )
    return tables + inner + max(up, outer + down)


def most_scratch(
    call: ExpertsCall | Stacks,
    top_k: int,
    all_experts: int,
    device: DeviceSpec,
    max_tokens: int,
    ordered: tuple[bool, bool] = (False, False),
) -> int:
    """The most of `scratch_bytes` that any number of tokens up to `max_tokens` takes."""
    most = min(max_tokens, pass_tokens(call.count, top_k))
    loads = (Load(tokens, top_k, all_experts) for tokens in rungs(most))
    return max(scratch_bytes(call, select(call, load, device), load, ordered) for load in loads)


def bins(count: int) -> int:
    """Places of a histogram over `count` experts and those slots that have none."""
    return max(_MIN_BINS, 1 << count.bit_length())


def counted_words(num_slots: int, count: int) -> int:
    """Words of the counts that several chunks of slots need."""
    chunks = -(-num_slots // CHUNK_SLOTS)
    return chunks * bins(count) if chunks > 1 else 0


def _sum_bytes(tile: TileConfig, slots: int, of: Call) -> int:
    return _WORD * tile.split_k * slots * of.n if tile.split_k > 1 else 0
