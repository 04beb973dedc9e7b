"""The tiles of the Triton kernel, by layout and kind of tensor core; `heuristics.py` chooses.

The tables come from ahead-of-time compilation (`audit/`; Triton 3.6, 3.7 and 3.9), not from
timing runs: no tile spills, stores a decoded weight to shared memory, or waits for a plain global
load. Wider tiles read x less often, narrower ones fill the GPU when N is small. On `mma.sync`
targets a tile of 32 or more tokens keeps its warps along N where it can, because warps spread over
tokens decode the same weights again. A tcgen05 tile has 32 rows of weight per warp: fewer make
Triton store the decoded weight to shared memory.

wgmma runs beside other instructions, so beyond 64 tokens, where it sets the pace, the scale
multiplies the weight instead of a partial product that would have to be waited for. mma.sync waits
in any case, and for tcgen05 Triton would store the scaled weight to shared memory.
"""

from dataclasses import dataclass, replace

from fusedq_kernels.types import DeviceSpec, Layout, TileConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """A tile, and the `GroupGeometry.step` below which it would spill registers."""

    tile: TileConfig
    min_step: int = 32


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
    block_m: int, block_n: int, num_warps: int, num_stages: int, min_step: int = 32
) -> Choice:
    return Choice(TileConfig(block_m, block_n, 1, num_warps, num_stages), min_step)


def _scaling(
    block_m: int, block_n: int, num_warps: int, num_stages: int, min_step: int = 32
) -> Choice:
    shape = (block_m, block_n, 1, num_warps, num_stages)
    return Choice(TileConfig(*shape, scale_weights=True, x_descriptor=True), min_step)


def _fine(block_m: int, block_n: int, num_warps: int, num_stages: int) -> tuple[Rule, ...]:
    """Few tokens first; narrower tiles than these load x two bytes at a time."""
    few, many = _tile(16, 128, 4, 3, 8), _tile(block_m, block_n, num_warps, num_stages, 8)
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


def _scaled_prefill(middle: Choice, narrow: Choice) -> tuple[Rule, ...]:
    return (
        Rule(128, (middle, narrow)),
        Rule(None, (_scaling(256, 128, 8, 3, 128), middle, narrow)),
    )


_WGMMA = Rules(
    decode=(
        Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
        Rule(16, (_tile(16, 128, 4, 4), _tile(16, 64, 4, 4))),
        Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 8, 4), _tile(32, 64, 4, 4))),
        Rule(64, (_tile(64, 256, 8, 4, 64), _tile(64, 128, 8, 4), _tile(64, 64, 4, 4))),
    ),
    # With 8 warps and fp16 scales under bf16, one Triton or another stores to shared memory.
    prefill=_scaled_prefill(_scaling(128, 128, 4, 2, 64), _scaling(64, 128, 8, 4)),
    in_order=TileConfig(64, 128, 1, 8, 4),
    fine=_fine(64, 128, 8, 4),
)
# Scaled values of a codebook pass through shared memory, in some combinations of dtypes.
_PL4_WGMMA = replace(
    _WGMMA, prefill=(Rule(None, (_tile(128, 128, 8, 3, 64), _tile(64, 128, 8, 4))),)
)
# So do 8-bit values less a zero point, in the narrow tile with Triton 3.6; with per-channel scales
# 4 warps spill.
_P8_WGMMA = replace(
    _WGMMA, prefill=_scaled_prefill(_scaling(128, 128, 8, 2, 64), _tile(64, 128, 8, 4))
)
_MMA_SYNC_IN_ORDER = TileConfig(32, 64, 1, 2, 4)
_MMA_SYNC_FINE = _fine(32, 128, 4, 3)


def _as_decode(decode: tuple[Rule, ...], in_order: TileConfig, fine: tuple[Rule, ...]) -> Rules:
    """More than 64 tokens run the tiles of 64."""
    return Rules(decode, (Rule(None, decode[-1].choices),), in_order, fine)


_TCGEN05 = _as_decode(
    (
        Rule(8, (_tile(8, 128, 4, 4),)),
        Rule(16, (_tile(16, 128, 4, 5),)),
        Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 4, 4))),
        Rule(64, (_tile(64, 256, 8, 3, 64), _tile(64, 128, 4, 3, 64), _tile(32, 128, 4, 4))),
    ),
    TileConfig(32, 128, 1, 4, 4),
    _fine(16, 128, 4, 3),
)
# 8-bit values in fp16 spill in the 32-token tiles with Triton 3.6, but for steps of 32.
_P8_TCGEN05 = replace(
    _TCGEN05,
    coarse=_as_decode(
        (*_TCGEN05.decode[:2], Rule(64, (_tile(64, 256, 8, 3), _tile(64, 128, 4, 3)))),
        _TCGEN05.in_order,
        _TCGEN05.fine,
    ),
)
_P4_MMA_SYNC = _as_decode(
    (
        Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
        Rule(16, (_tile(16, 128, 4, 4), _tile(16, 64, 4, 4))),
        Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 4, 4), _tile(32, 64, 2, 4))),
        Rule(
            64,
            (
                _tile(64, 256, 8, 3, 128),
                _tile(64, 128, 8, 3),
                _tile(64, 64, 4, 3, 64),
                _tile(32, 64, 2, 4),
            ),
        ),
    ),
    _MMA_SYNC_IN_ORDER,
    _MMA_SYNC_FINE,
)
_P8_MMA_SYNC = _as_decode(
    (
        Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
        Rule(16, (_tile(16, 128, 4, 4, 128), _tile(16, 64, 4, 4))),
        Rule(32, (_tile(32, 256, 8, 3), _tile(32, 128, 4, 4), _tile(32, 64, 2, 4))),
        Rule(64, (_tile(64, 128, 8, 3, 64), _tile(32, 64, 2, 4))),
    ),
    _MMA_SYNC_IN_ORDER,
    _MMA_SYNC_FINE,
)
_PL4_MMA_SYNC = _as_decode(
    (
        Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
        Rule(16, (_tile(16, 64, 4, 4),)),
        Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 4, 4), _tile(32, 64, 2, 4))),
        Rule(64, (_tile(64, 128, 8, 3), _tile(64, 64, 4, 3, 64), _tile(32, 64, 2, 4))),
    ),
    # The narrow tile spills with several segments.
    TileConfig(32, 128, 1, 4, 4),
    _MMA_SYNC_FINE,
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
    rules = {9: wgmma, 10: tcgen05}.get(device.capability[0], mma_sync)
    if step < 32:
        return rules.fine
    if step >= 64 and rules.coarse is not None:
        rules = rules.coarse
    if batch_invariant:
        return (*rules.decode, Rule(None, (Choice(rules.in_order),)))
    return (*rules.decode, *rules.prefill)
