"""Kernel and tile selection: golden launches, and properties that hold for every problem."""

from dataclasses import replace

import pytest
import torch

from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.heuristics import (
    reachable_launches,
    select,
    tiles_for,
)
from fusedq_kernels.cuda.arrivals import MAX_TILES
from fusedq_kernels.types import (
    GemmShape,
    Launch,
    Policy,
    QuantSpec,
    TileConfig,
    WeightType,
)

H200 = device_by_name("h200")
RTX4090 = device_by_name("rtx4090")
B200 = device_by_name("b200")

SPEC = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
NO_ROWS = lambda device: None  # noqa: E731
SCALING = (1, True, True)
STEPS = (1, False, False, True)  # scale_steps
SIZES = [8, 576, 1024, 2048, 2056, 4096, 6528, 14336, 57344]
TOKENS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 2048]


@pytest.mark.parametrize(
    ("device", "shape", "tile", "source"),
    [
        (H200, (1, 4096, 4096), (8, 64, 8, 2, 4), "rule: m<=8, 8x64, split 8"),
        (H200, (8, 28672, 4096), (8, 128, 1, 4, 4), "rule: m<=8, 8x128"),
        (H200, (1, 2048, 2048), (8, 64, 4, 2, 4), "rule: m<=8, 8x64, split 4"),
        (H200, (16, 6144, 4096), (16, 64, 4, 4, 4), "rule: m<=16, 16x64, split 4"),
        (H200, (17, 6144, 4096), (32, 64, 4, 4, 4), "rule: m<=32, 32x64, split 4"),
        (H200, (33, 4096, 14336), (64, 64, 4, 4, 4), "rule: m<=64, 64x64, split 4"),
        (H200, (64, 28672, 4096), (64, 128, 1, 8, 4), "rule: m<=64, 64x128"),
        (H200, (128, 4096, 4096), (64, 64, 1, 4, 4, *SCALING), "rule: m<=256, 64x64"),
        (H200, (65, 4096, 14336), (128, 64, 4, 4, 3, *SCALING), "rule: m<=256, 128x64, split 4"),
        (H200, (512, 4096, 4096), (128, 128, 1, 8, 3, *SCALING), "rule: m>256, 128x128"),
        (H200, (4096, 8192, 8192), (256, 128, 1, 8, 3, *SCALING), "rule: m>256, 256x128"),
        (H200, (1, 1024, 1152), (8, 64, 2, 2, 4), "rule: m<=8, 8x64, split 2"),
        (RTX4090, (64, 2048, 2048), (64, 64, 2, 4, 3), "rule: m<=64, 64x64, split 2"),
        (RTX4090, (512, 8192, 8192), (64, 256, 1, 8, 3), "rule: m>64, 64x256"),
        (B200, (1, 1024, 4096), (8, 128, 8, 4, 4, *STEPS), "rule: m<=8, 8x128, split 8"),
    ],
)
def test_golden_launches(device, shape, tile, source):
    chosen = select(GemmShape(*shape), SPEC, device, table_for=NO_ROWS)
    assert chosen == Launch("triton-gemm", TileConfig(*tile), source)


@pytest.mark.parametrize(
    ("shape", "tile", "source"),
    [
        ((1, 4096, 4096), (16, 64, 8, 4, 4), "rule: m<=16, 16x64, split 8, batch-invariant"),
        ((64, 4096, 4096), (64, 64, 8, 4, 4), "rule: m<=64, 64x64, split 8, batch-invariant"),
        (
            (65, 4096, 4096),
            (64, 128, 1, 8, 4, 8),
            "rule: m>64, 64x128, segments 8, batch-invariant",
        ),
        ((512, 28672, 4096), (64, 128, 1, 8, 4), "rule: m>64, 64x128, batch-invariant"),
    ],
)
def test_golden_batch_invariant_launches(shape, tile, source):
    chosen = select(GemmShape(*shape), SPEC, H200, policy=Policy(True))
    assert chosen == Launch("triton-gemm", TileConfig(*tile), source)


@pytest.mark.parametrize("device", [H200, RTX4090, B200], ids=lambda device: device.name)
@pytest.mark.parametrize("group_size", [16, 128])
def test_batch_invariant_layers_cut_k_alike_for_every_number_of_tokens(device, group_size):
    spec = replace(SPEC, group_size=group_size)
    for n in SIZES:
        for k in SIZES[1:]:
            shapes = [GemmShape(m, n, k) for m in TOKENS]
            tiles = [select(shape, spec, device, policy=Policy(True)).tile for shape in shapes]
            assert len({tile.split_k * tile.segments for tile in tiles}) == 1
            assert not any(tile.scale_weights for tile in tiles)
            assert all(tile.block_m >= 16 for tile in tiles)
            plain = (replace(tile, split_k=1, segments=1) for tile in tiles)
            step = min(group_size, 128)
            assert set(plain) <= set(tiles_for(device, WeightType.UINT4B8, step, True))


def test_reachable_launches_are_all_that_select_returns():
    for device in (H200, RTX4090):
        for batch_invariant in (False, True):
            policy = Policy(batch_invariant)
            found = reachable_launches(4096, 4096, SPEC, device, 1100, policy)
            chosen = [
                select(GemmShape(m, 4096, 4096), SPEC, device, policy) for m in range(1, 1101)
            ]
            assert {launch.tile for _, launch in found} == {launch.tile for launch in chosen}
            for m, launch in found:
                assert chosen[m - 1] == launch
                assert launch.tile not in {earlier.tile for earlier in chosen[: m - 1]}


def test_two_groups_or_more_per_block_avoid_the_largest_tiles():
    for group_size, expected in ((32, 128), (96, 128), (64, 128), (128, 256)):
        spec = replace(SPEC, group_size=group_size)
        chosen = select(GemmShape(8192, 8192, 8192), spec, H200, table_for=NO_ROWS)
        assert chosen.tile.block_m == expected


@pytest.mark.parametrize("device", KNOWN_DEVICES.values(), ids=KNOWN_DEVICES)
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, 1 << 20])
@pytest.mark.parametrize("weight_type", [WeightType.UINT4B8, WeightType.UINT8B128, WeightType.NF4])
def test_every_launch_is_valid(device, weight_type, group_size):
    spec = QuantSpec(weight_type, group_size, torch.bfloat16)
    step = min(group_size, 128)
    for n in SIZES:
        n_padded = -(-n // 128) * 128
        for k in SIZES[1:]:
            num_blocks = -(-k // 128)
            for m in TOKENS:
                tile = select(GemmShape(m, n, k), spec, device, table_for=NO_ROWS).tile
                assert replace(tile, split_k=1) in tiles_for(device, weight_type, step)
                assert n_padded % tile.block_n == 0
                blocks_per_split = -(-num_blocks // tile.split_k)
                assert 1 <= tile.split_k <= 16
                num_tiles = -(-m // tile.block_m) * (n_padded // tile.block_n)
                assert tile.split_k == 1 or num_tiles <= MAX_TILES
                assert (tile.split_k - 1) * blocks_per_split < num_blocks, "an empty split"
