"""Which tile of a rule fills the GPU, and how many splits of K pay for their sums."""

import pytest

from fusedq_kernels.choose import waves
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.heuristics import partial_sum_bytes, select
from fusedq_kernels.choose.tiles import Choice
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import GemmShape, Policy, QuantSpec, TileConfig, WeightType

H200 = device_by_name("h200")
SPEC = QuantSpec(WeightType.UINT4B8, 128, DType.BFLOAT16)
NARROW = Choice(TileConfig(64, 64, 1, 4, 4), per_sm=2)
WIDE = Choice(TileConfig(64, 128, 1, 8, 4), per_sm=1, may_split=False)


@pytest.mark.parametrize(
    ("programs", "places", "expected"),
    [(1, 4, 0.25), (4, 4, 1.0), (5, 4, 0.625), (8, 4, 1.0), (9, 4, 0.75), (3, 0, 1.0)],
)
def test_fullness_is_the_share_of_all_waves(programs: int, places: int, expected: float) -> None:
    assert waves.fullness(programs, places) == expected


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        # 96 tiles are 73 % of a wave of one program on each of 132 SMs, 88 are 67 %.
        (12288, (128, 1)),
        (11264, (64, 1)),
        # A second wave of 16 is emptier than two narrow ones.
        (18944, (64, 1)),
    ],
)
def test_a_wide_tile_is_for_waves_that_it_fills(n: int, expected: tuple[int, int]) -> None:
    tile = waves.pick([WIDE, NARROW], GemmShape(64, n, 4096), 4, H200)
    assert (tile.block_n, tile.split_k) == expected


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (64, 4096, 14336, 4),  # 64 tiles: 4 splits are 256 of 264 places
        (64, 4096, 4096, 2),  # the sums of 4 would be as large as the weight
        (64, 1024, 4096, 4),  # but an eighth of the GPU takes that much longer for it
        (65, 4096, 4096, 1),
        (64, 16896, 14336, 1),  # every place taken
        (64, 4096, 896, 1),  # 7 blocks
        (64, 64, 1 << 20, 16),
    ],
)
def test_splits_fill_one_wave_and_pay_for_their_sums(m: int, n: int, k: int, expected: int) -> None:
    assert waves.split_for(NARROW, GemmShape(m, n, k), 4, H200) == expected


def test_twice_the_bits_pay_for_twice_the_sums() -> None:
    shape = GemmShape(64, 4096, 4096)
    assert [waves.split_for(NARROW, shape, bits, H200) for bits in (4, 8)] == [2, 4]


@pytest.mark.parametrize("device", KNOWN_DEVICES.values(), ids=KNOWN_DEVICES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_call_stores_more_sums_than_a_plan_counts(device, batch_invariant: bool) -> None:
    options = {"policy": Policy(batch_invariant), "table_for": lambda _: None}
    for n, k in ((1024, 4096), (4096, 14336), (576, 28672)):
        stored = 0
        for m in range(1, 2100, 7):
            tile = select(GemmShape(m, n, k), SPEC, device, **options).tile
            stored = max(stored, 4 * tile.split_k * m * n if tile.split_k > 1 else 0)
        assert stored <= partial_sum_bytes(n, k, SPEC, device, **options) < 2 * stored + 1
