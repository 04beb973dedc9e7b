"""Tuning: which tiles are measured, what rows come of it, and the dry run of the command."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tune
from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.types import GemmShape, QuantSpec, TileConfig, WeightType
from gemmbench.results import ResultFile
from vllm_fusedq.measure import candidates
from vllm_fusedq.measure.roofline import rates_for

H200 = device_by_name("h200")
RATES = rates_for(H200)
INT4 = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
TILE = TileConfig(block_m=16, block_n=128, split_k=4, num_warps=4, num_stages=4)


def measured(m: int, split_k: int, us: float, num_stages: int = 4) -> candidates.Measurement:
    tile = replace(TILE, split_k=split_k, num_stages=num_stages)
    return candidates.Measurement(GemmShape(m, 4096, 4096), INT4, tile, us)


@pytest.mark.parametrize("m", [8, 64, 2048])
@pytest.mark.parametrize("n", [4096, 4736])
def test_candidates_begin_with_the_rules_and_can_all_run(n: int, m: int) -> None:
    shape = GemmShape(m, n, 4096)
    found = candidates.candidates(shape, INT4, H200, RATES, keep=12)
    assert found[0] == select(shape, INT4, H200, table_for=lambda _: None).tile
    assert len(found) == len(set(found)) == 12
    for tile in found:
        assert math.ceil(n / 128) * 128 % tile.block_n == 0
        assert math.ceil(32 / math.ceil(32 / tile.split_k)) == tile.split_k
        assert not (tile.scale_weights and m <= 64)
        assert tile.num_stages >= 2


def test_twice_and_half_the_splits_of_the_rules_are_tried() -> None:
    found = candidates.candidates(GemmShape(16, 6144, 4096), INT4, H200, RATES, keep=4)
    assert {4, 8, 2} <= {tile.split_k for tile in found}


def test_a_split_leaves_no_split_empty() -> None:
    assert candidates.splits_for(4096) == [1, 2, 3, 4, 6, 8, 16]
    assert candidates.splits_for(128) == [1]
    assert 3 in candidates.splits_for(128 * 9)


def test_a_row_is_the_fastest_tile_of_its_tokens() -> None:
    found = candidates.tuned_rows(
        [
            *(measured(8, 8, 4.0), measured(8, 4, 4.4), measured(8, 4, 4.2, num_stages=5)),
            *(measured(64, 8, 9.0), measured(64, 4, 6.0), measured(512, 1, 50.0)),
        ]
    )
    assert [(row.max_m, row.tile.split_k, row.us) for row in found] == [
        (8, 8, 4.0),
        (64, 4, 6.0),
        (512, 1, 50.0),
    ]


def test_an_unfinished_shape_gets_no_rows() -> None:
    assert candidates.tuned_rows([measured(8, 4, 4.0), measured(512, 1, 50.0)]) == []


def test_where_slices_are_fastest_the_fastest_tile_stands_beside_them() -> None:
    def sliced(us: float, m: int = 512) -> candidates.Measurement:
        shape = GemmShape(m, 4096, 4096)
        return candidates.Measurement(shape, INT4, None, us, "sliced-cublas")

    tiles = [measured(64, 4, 6.0), measured(512, 1, 50.0), measured(512, 2, 40.0)]
    more = [measured(2048, 1, 200.0), sliced(100.0, 2048)]
    found = candidates.tuned_rows([*tiles, sliced(30.0), *more])
    assert [(row.max_m, row.kernel, row.us, row.min_m) for row in found] == [
        (64, "triton-gemm", 6.0, 1),
        (512, "triton-gemm", 40.0, 1),
        # Between 64 tokens, where the tile won, and 512.
        (512, "sliced-cublas", 30.0, 182),
        (2048, "triton-gemm", 200.0, 1),
        (2048, "sliced-cublas", 100.0, 1),
    ]
    assert len(candidates.tuned_rows([*tiles, sliced(60.0)])) == 2
    assert len(candidates.tuned_rows([tiles[0], sliced(60.0)])) == 1


def run(*arguments: object) -> str:
    done = CliRunner().invoke(tune.app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_dry_run_writes_rows_that_select_reads_and_resumes(tmp_path: Path) -> None:
    options = ("--dry-run", "--keep", 2, "--bucket", 64, "--out", tmp_path)
    assert "0 s" in run(*options, "--seconds", 0)
    assert "4 rows in" in run(*options)
    path = tmp_path / "h200.json"
    (table,) = tuning.read(path)
    # Of each shape first groups of 128, then of 32.
    launch = select(GemmShape(64, 256, 128), INT4, H200, table_for=lambda _: table)
    assert launch.source == "tuned:h200 row 3"
    assert "[1/" not in run(*options)
    before = (tmp_path / "tune.csv").read_text()
    assert "[1/4" in run(*options, "--bucket", 8)
    assert (tmp_path / "tune.csv").read_text().startswith(before)
    (table,) = tuning.read(path)
    assert [row.max_m for row in table.rows] == [8, 64] * 4


def test_a_dry_run_measures_slices_for_many_tokens(tmp_path: Path) -> None:
    buckets = ("--bucket", 64, "--bucket", 512, "--group-size", 128)
    run("--dry-run", "--keep", 1, *buckets, "--out", tmp_path)
    file = ResultFile(tmp_path / "tune.csv", tune.COLUMNS)
    found = [row for row in file.rows() if row["kernel"] == "sliced-cublas"]
    assert {(row["m"], row["block_m"]) for row in found} == {("512", "")}
    assert all(float(row["us"]) > 0 for row in found)
    (table,) = tuning.read(tmp_path / "h200.json")
    assert "triton-gemm" in {row.kernel for row in table.rows if row.max_m == 512}


def test_tables_of_another_triton_stay(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    row = tuning.TunedRow(*(WeightType.UINT4B8, 128, 4096, 4096, 64, "triton-gemm", TILE, 5.0))
    tuning.write(path, [tuning.TunedTable("h200", "2.9.0", "2026-01-01", "abc", (row,))])
    run("--dry-run", "--keep", 1, "--bucket", 64, "--out", tmp_path)
    assert [len(table.rows) for table in tuning.read(path)] == [1, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on() -> None:
    done = CliRunner().invoke(tune.app, [])
    assert done.exit_code == 2
    assert "no CUDA device here; --dry-run" in " ".join(done.output.replace("│", " ").split())
