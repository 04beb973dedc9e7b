"""The tiles of the Triton kernel, by layout and kind of tensor core; `waves.py` chooses among them.

Every tile comes from ahead-of-time compilation (`audit/`; Triton 3.6 to 3.9): none spills, stores a
decoded weight to shared memory, or waits for a plain global load. For wgmma the widths, warps and
`per_sm` are those that were fastest on an H200 with 4 bits (benchmarks/results/h200); no other GPU
was measured. Wider tiles read x less often, narrower ones fill the GPU when N is small. On
`mma.sync` targets a tile of 32 or more tokens keeps its warps along N where it can, because warps
spread over tokens decode the same weights again. A tcgen05 tile has 32 rows of weight per warp:
fewer make Triton store the decoded weight to shared memory.

wgmma runs beside other instructions, so beyond 64 tokens, where it sets the pace, the scale
multiplies the weight instead of a partial product that would have to be waited for. mma.sync waits
in any case, and for tcgen05 Triton would store the scaled weight to shared memory.
"""

from dataclasses import dataclass, replace

from fusedq_kernels.geometry import BLOCK_K
from fusedq_kernels.types import DeviceSpec, Layout, TileConfig

# Programs of few warps share a multiprocessor: about as many warps as hide each other's waits.
_WARPS_PER_SM = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """A tile, and when it comes into question.

    `per_sm` programs keep a multiprocessor busy. One that `may_split` takes as many splits of K as
    fill the GPU; the others are for weights with enough outputs. Groups of a `GroupGeometry.step`
    below `min_step` would spill registers, those above `max_step` have a better tile.
    """

    tile: TileConfig
    per_sm: int
    may_split: bool = True
    min_step: int = 32
    max_step: int = BLOCK_K

    def suits(self, step: int) -> bool:
        return self.min_step <= step <= self.max_step


@dataclass(frozen=True, slots=True)
class Rule:
    """Tiles for up to `max_m` tokens, widest first; the last one takes whatever is left."""

    max_m: int | None
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules of one kind of tensor core, fewest tokens first.

    `fine` is for groups that 32 does not divide, whatever the number of tokens; `in_order` takes
    the place of `prefill` in a batch-invariant layer. `coarse` takes the place of all where a group
    holds whole steps of 64.
    """

    decode: tuple[Rule, ...]
    prefill: tuple[Rule, ...]
    in_order: TileConfig
    fine: tuple[Rule, ...]
    coarse: "Rules | None" = None


def _tile(
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    min_step: int = 32,
    max_step: int = BLOCK_K,
    per_sm: int | None = None,
) -> Choice:
    tile = TileConfig(block_m, block_n, 1, num_warps, num_stages)
    per_sm = per_sm or _WARPS_PER_SM // num_warps
    return Choice(tile, per_sm, min_step=min_step, max_step=max_step)


def _wide(*sizes: int, **options: int) -> Choice:
    """Unsplit only: with splits a narrower tile has fewer sums to add up alone."""
    return replace(_tile(*sizes, **options), may_split=False)


def _scaling(*sizes: int, **options: int) -> Choice:
    choice = _tile(*sizes, **options)
    return replace(choice, tile=replace(choice.tile, scale_weights=True, x_descriptor=True))


def _fine(block_m: int, block_n: int, num_warps: int, num_stages: int) -> tuple[Rule, ...]:
    """Few tokens first; narrower tiles than these load x two bytes at a time."""
    few = _tile(16, 128, 4, 3, min_step=8)
    many = _tile(block_m, block_n, num_warps, num_stages, min_step=8)
    return Rule(16, (few,)), Rule(None, (many,))


def _scaling_steps(rules: Rules) -> Rules:
    """For tcgen05: a sum that runs through all of K would stay in tensor memory, and Triton then
    brings the tokens through registers, waiting for each load."""

    def changed(some: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(replace(rule, choices=tuple(map(scaled, rule.choices))) for rule in some)

    def scaled(choice: Choice) -> Choice:
        return replace(choice, tile=replace(choice.tile, scale_steps=True))

    return Rules(
        changed(rules.decode),
        changed(rules.prefill),
        replace(rules.in_order, scale_steps=True),
        changed(rules.fine),
        None if rules.coarse is None else _scaling_steps(rules.coarse),
    )


# Up to 256 tokens a wider tile would be mostly empty. Two programs of one warpgroup share an SM:
# one decodes while the other multiplies, where the warpgroups of one program wait for each other.
_ONE_WARPGROUP = (_scaling(128, 64, 4, 3), _scaling(64, 64, 4, 4))
_WGMMA = Rules(
    decode=(
        Rule(8, (_wide(8, 128, 4, 4), _tile(8, 64, 2, 4, per_sm=6))),
        Rule(16, (_wide(16, 128, 4, 4), _tile(16, 64, 4, 4, per_sm=4))),
        Rule(32, (_wide(32, 128, 4, 4), _tile(32, 64, 4, 4, per_sm=3))),
        Rule(64, (_wide(64, 128, 8, 4), _tile(64, 64, 4, 4))),
    ),
    prefill=(
        Rule(256, _ONE_WARPGROUP),
        Rule(
            None,
            (_scaling(256, 128, 8, 3, min_step=128), _scaling(128, 128, 8, 3), *_ONE_WARPGROUP),
        ),
    ),
    in_order=TileConfig(64, 128, 1, 8, 4),
    fine=_fine(64, 128, 8, 4),
)
# Scaled values of a codebook pass through shared memory, in some combinations of dtypes; of the
# exact tiles 128x64 spills.
_EXACT = (_wide(64, 128, 8, 4), _tile(64, 64, 4, 4))
_PL4_WGMMA = replace(
    _WGMMA, prefill=(Rule(256, _EXACT), Rule(None, (_tile(128, 128, 8, 3, min_step=64), *_EXACT)))
)
# Two programs of three stages do not fit an SM's shared memory.
_P8_ONE_WARPGROUP = (_scaling(128, 64, 4, 2), _scaling(64, 64, 4, 4))
_P8_WGMMA = replace(
    _WGMMA,
    prefill=(
        Rule(256, _P8_ONE_WARPGROUP),
        Rule(
            None,
            (
                *(_scaling(256, 128, 8, 3, min_step=128), _scaling(128, 128, 8, 2, min_step=64)),
                *_P8_ONE_WARPGROUP,
            ),
        ),
    ),
)
_MMA_SYNC_IN_ORDER = TileConfig(32, 64, 1, 2, 4)
_MMA_SYNC_FINE = _fine(32, 128, 4, 3)
_MMA_SYNC_FEW = (
    Rule(8, (_wide(8, 128, 4, 4), _tile(8, 64, 4, 4, per_sm=4))),
    Rule(16, (_wide(16, 128, 4, 4), _tile(16, 64, 4, 4, per_sm=4))),
)


def _as_decode(decode: tuple[Rule, ...], in_order: TileConfig, fine: tuple[Rule, ...]) -> Rules:
    """More than 64 tokens run the tiles of 64."""
    return Rules(decode, (Rule(None, decode[-1].choices),), in_order, fine)


_TCGEN05 = _as_decode(
    (
        Rule(8, (_tile(8, 128, 4, 4),)),
        Rule(16, (_tile(16, 128, 4, 5),)),
        Rule(32, (_wide(32, 256, 8, 4), _tile(32, 128, 4, 4))),
        Rule(
            64,
            (
                _wide(64, 256, 8, 3, min_step=64),
                _tile(64, 128, 4, 3, min_step=64),
                _tile(32, 128, 4, 4, max_step=32),
            ),
        ),
    ),
    TileConfig(32, 128, 1, 4, 4),
    _fine(16, 128, 4, 3),
)
# 8-bit values in fp16 spill in the 32-token tiles with Triton 3.6, but for steps of 32.
_P8_TCGEN05 = replace(
    _TCGEN05,
    coarse=_as_decode(
        (*_TCGEN05.decode[:2], Rule(64, (_wide(64, 256, 8, 3), _tile(64, 128, 4, 3)))),
        _TCGEN05.in_order,
        _TCGEN05.fine,
    ),
)
_MMA_SYNC_NARROW = _tile(32, 64, 2, 4, per_sm=6)
_MMA_SYNC_FINE_STEPS = replace(_MMA_SYNC_NARROW, max_step=32)
_P4_MMA_SYNC = _as_decode(
    (
        *_MMA_SYNC_FEW,
        Rule(32, (_wide(32, 256, 8, 4), _wide(32, 128, 4, 4), _MMA_SYNC_NARROW)),
        Rule(
            64,
            (
                *(_wide(64, 256, 8, 3, min_step=128), _wide(64, 128, 8, 3)),
                *(_tile(64, 64, 4, 3, min_step=64), _MMA_SYNC_FINE_STEPS),
            ),
        ),
    ),
    _MMA_SYNC_IN_ORDER,
    _MMA_SYNC_FINE,
)
_P8_MMA_SYNC = _as_decode(
    (
        _MMA_SYNC_FEW[0],
        Rule(16, (_wide(16, 128, 4, 4, min_step=128), _tile(16, 64, 4, 4, per_sm=4))),
        Rule(32, (_wide(32, 256, 8, 3), _wide(32, 128, 4, 4), _MMA_SYNC_NARROW)),
        Rule(64, (_tile(64, 128, 8, 3, min_step=64), _MMA_SYNC_FINE_STEPS)),
    ),
    _MMA_SYNC_IN_ORDER,
    _MMA_SYNC_FINE,
)
_PL4_MMA_SYNC = _as_decode(
    (
        _MMA_SYNC_FEW[0],
        Rule(16, (_tile(16, 64, 4, 4, per_sm=4),)),
        Rule(32, (_wide(32, 256, 8, 4), _wide(32, 128, 4, 4), _MMA_SYNC_NARROW)),
        Rule(
            64,
            (
                *(_wide(64, 128, 8, 3), _tile(64, 64, 4, 3, min_step=64)),
                _MMA_SYNC_FINE_STEPS,
            ),
        ),
    ),
    # The narrow tile spills with several segments.
    TileConfig(32, 128, 1, 4, 4),
    _MMA_SYNC_FINE,
)
# AMD's matrix cores (MFMA), in waves of 64 threads: compiled for gfx942 and gfx950, never run. 64
# tokens of groups finer than 32 spill.
_MFMA = _as_decode(
    (
        Rule(16, (_tile(16, 128, 4, 2),)),
        Rule(32, (_tile(32, 128, 4, 2),)),
        Rule(64, (_tile(64, 128, 8, 2),)),
    ),
    TileConfig(32, 128, 1, 4, 2),
    (
        Rule(16, (_tile(16, 128, 4, 2, min_step=8),)),
        Rule(None, (_tile(32, 128, 4, 2, min_step=8),)),
    ),
)
_RULES = {
    Layout.P4: (_WGMMA, _scaling_steps(_TCGEN05), _P4_MMA_SYNC),
    Layout.PL4: (_PL4_WGMMA, _scaling_steps(_TCGEN05), _PL4_MMA_SYNC),
    Layout.P8: (_P8_WGMMA, _scaling_steps(_P8_TCGEN05), _P8_MMA_SYNC),
}


def rules_for(
    device: DeviceSpec, layout: Layout, step: int, batch_invariant: bool
) -> tuple[Rule, ...]:
    """The rules of a GPU for weights in a tiled layout with groups of `GroupGeometry.step`."""
    wgmma, tcgen05, mma_sync = _RULES[layout]
    of_nvidia = {9: wgmma, 10: tcgen05, 11: tcgen05}.get(device.capability[0], mma_sync)
    rules = _MFMA if device.kind == "hip" else of_nvidia
    if step < 32:
        return rules.fine
    if step >= 64 and rules.coarse is not None:
        rules = rules.coarse
    if batch_invariant:
        return (*rules.decode, Rule(None, (Choice(rules.in_order, per_sm=1),)))
    return (*rules.decode, *rules.prefill)
