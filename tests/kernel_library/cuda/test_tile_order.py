"""Which program computes which tile: every tile once, many tokens in groups."""

import pytest
import torch
import triton
import triton.language as tl

from fusedq_kernels import testing
from fusedq_kernels.choose import waves
from fusedq_kernels.cuda import gemm
from fusedq_kernels.cuda.gemm_kernel import tile_of
from fusedq_kernels.types import QuantSpec, TileConfig, WeightType
from gemm_runs import DEVICE, launch, pack, run

HALF = torch.float16


@triton.jit
def count_kernel(counts_ptr, tiles_m, tiles_n, SPLIT_K: tl.constexpr):
    pid_m, pid_n, pid_k = tile_of(SPLIT_K)
    if pid_m < tiles_m:
        tl.atomic_add(counts_ptr + (pid_k * tiles_m + pid_m) * tiles_n + pid_n, 1)


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("m", [1, 2048, 2049, 2305, 4097])
@pytest.mark.parametrize("block_m", [128, 256])
def test_every_tile_belongs_to_one_program(m, block_m, split_k):
    tiles_m, tiles_n = -(-m // block_m), 2
    counts = torch.zeros(split_k, tiles_m, tiles_n, dtype=torch.int32, device=DEVICE)
    tile = TileConfig(block_m, 128, split_k, 4, 2)
    grid = gemm.launch_grid(m, 128 * tiles_n, tile)
    count_kernel[grid](counts, tiles_m, tiles_n, SPLIT_K=split_k)
    assert (counts == 1).all()
    idle = grid[0] * grid[1] * grid[2] - counts.numel()
    assert idle < tiles_n * grid[2], "more than one token tile short in a group"


@pytest.mark.parametrize(
    ("m", "block_m", "expected"),
    [
        (1, 8, (1, 32, 1)),
        (2048, 256, (8, 32, 1)),
        (2048, 64, (32, 32, 1)),
        (2049, 256, (5, 32, 2)),
        (8192, 256, (8, 32, 4)),
        (8192, 64, (32, 32, 4)),
    ],
)
def test_groups_hold_as_many_tokens_as_stay_in_l2(m, block_m, expected):
    """Token tiles are the first axis, which a GPU starts first, and groups of them the last."""
    assert gemm.launch_grid(m, 4096, TileConfig(block_m, 128, 1, 4, 2)) == expected


@pytest.mark.parametrize("options", [{}, {"segments": 3}, {"scale_weights": True}])
def test_grouped_tiles_give_the_same_bits(monkeypatch, options):
    problem = testing.make_problem(139, 136, 272, QuantSpec(WeightType.UINT4, 64, HALF))
    packed = pack(problem.logical, HALF)
    plain = run(problem.x, packed, None, launch(**options))
    testing.assert_close(plain, problem.expected, max_error=1e-2, rms_error=1e-3)
    for tokens in (32, 48, 64):
        monkeypatch.setattr(waves, "GROUP_TOKENS", tokens)
        y = run(problem.x, packed, None, launch(**options))
        assert gemm.launch_grid(139, 256, launch().tile)[2] > 1
        assert torch.equal(y, plain), tokens
