"""The tiles of the Triton kernel, by layout and kind of tensor core; `heuristics.py` chooses.

The tables come from ahead-of-time compilation (`audit.py`; Triton 3.9, and 3.6 for P4), not from
timing runs: no tile spills, stores a decoded weight to shared memory, or waits for a plain global
load. Wider tiles read x less often, narrower ones fill the GPU when N is small. On `mma.sync`
targets a tile of 32 or more tokens keeps its warps along N where it can, because warps spread over
tokens decode the same weights again. A tcgen05 tile has 32 rows of weight per warp: fewer make
Triton store the decoded weight to shared memory.
"""

from dataclasses import dataclass

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


def _tile(
    block_m: int, block_n: int, num_warps: int, num_stages: int, min_step: int = 32
) -> Choice:
    return Choice(TileConfig(block_m, block_n, 1, num_warps, num_stages), min_step)


_WGMMA = (
    Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
    Rule(16, (_tile(16, 128, 4, 4), _tile(16, 64, 4, 4))),
    Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 8, 4), _tile(32, 64, 4, 4))),
    Rule(64, (_tile(64, 256, 8, 4, 64), _tile(64, 128, 8, 4), _tile(64, 64, 4, 4))),
    Rule(None, (_tile(128, 128, 8, 3, 64), _tile(64, 128, 8, 4))),
)
_TCGEN05 = (
    Rule(8, (_tile(8, 128, 4, 4),)),
    Rule(16, (_tile(16, 128, 4, 4),)),
    Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 4, 4))),
    Rule(None, (_tile(64, 256, 8, 3, 64), _tile(64, 128, 4, 3, 64), _tile(32, 128, 4, 4))),
)
_P4_MMA_SYNC = (
    Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
    Rule(16, (_tile(16, 128, 4, 4), _tile(16, 64, 4, 4))),
    Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 4, 4), _tile(32, 64, 2, 4))),
    Rule(
        None,
        (
            _tile(64, 256, 8, 3, 128),
            _tile(64, 128, 8, 3),
            _tile(64, 64, 4, 3, 64),
            _tile(32, 64, 2, 4),
        ),
    ),
)
_P8_MMA_SYNC = (
    Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
    Rule(16, (_tile(16, 128, 4, 4, 128), _tile(16, 64, 4, 4))),
    Rule(32, (_tile(32, 256, 8, 3), _tile(32, 128, 4, 4), _tile(32, 64, 2, 4))),
    Rule(None, (_tile(64, 128, 8, 3, 64), _tile(32, 64, 2, 4))),
)
_PL4_MMA_SYNC = (
    Rule(8, (_tile(8, 128, 4, 4), _tile(8, 64, 4, 4))),
    Rule(16, (_tile(16, 64, 4, 4),)),
    Rule(32, (_tile(32, 256, 8, 4), _tile(32, 128, 4, 4), _tile(32, 64, 2, 4))),
    Rule(None, (_tile(64, 128, 8, 3), _tile(64, 64, 4, 3, 64), _tile(32, 64, 2, 4))),
)
_RULES = {
    Layout.P4: (_WGMMA, _TCGEN05, _P4_MMA_SYNC),
    Layout.PL4: (_WGMMA, _TCGEN05, _PL4_MMA_SYNC),
    Layout.P8: (_WGMMA, _TCGEN05, _P8_MMA_SYNC),
}


def rules_for(device: DeviceSpec, layout: Layout) -> tuple[Rule, ...]:
    """The rules of a GPU for weights in a tiled layout, fewest tokens first."""
    wgmma, tcgen05, mma_sync = _RULES[layout]
    return {9: wgmma, 10: tcgen05}.get(device.capability[0], mma_sync)
