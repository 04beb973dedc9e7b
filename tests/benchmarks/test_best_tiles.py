"""The rules against what was measured, and the rows that were made of it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import best_tiles
from fusedq_kernels.choose import tuning
from fusedq_kernels.types import GemmShape, TileConfig
from gemmbench import measured
from gemmbench.results import RESULTS
from vllm_fusedq.measure import candidates

H200 = RESULTS / "h200"
HEADER = "n,k,m,variant,us,iqr,gbs,tflops,error,note\n"


def test_the_rules_lose_little_against_the_fastest_measured_tiles() -> None:
    found = list(best_tiles.compare(H200, "h200"))
    losses = [each.loss for each in found if each.loss is not None]
    assert len(found) - len(losses) <= 1, "choices that were never measured"
    assert {each.shape.m for each in found} == {1, 16, 32, 64, 128, 256, 512, 2048, 8192}
    assert best_tiles.geometric_mean(losses) <= 0.005
    assert max(losses) <= 0.03


def test_the_packaged_rows_are_those_of_the_result_files() -> None:
    (table,) = tuning.read(tuning.FOLDER / "h200.json")
    assert list(table.rows) == candidates.tuned_rows(best_tiles.measurements(H200, "h200"))
    sliced = [row for row in table.rows if row.kernel == "sliced-cublas"]
    assert {(row.n, row.k) for row in sliced if row.max_m == 8192} == {
        *((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)),
    }
    assert min(row.min_m for row in sliced if row.max_m == 2048) == 1025


def test_labels_become_tiles_and_other_forms_are_left_out(tmp_path: Path) -> None:
    for name in ("tiles.csv", "changes-2.csv"):
        (tmp_path / name).write_text(HEADER)
    (tmp_path / "changes.csv").write_text(
        HEADER
        + "4096,512,64,cublas,9.0,,,,,\n"
        + "4096,512,64,128x64 w4 s3 k2 scaled asm wait,7.0,,,,,\n"
        + "4096,512,64,128x64 w4 s3 k2 scaled,6.0,,,,,\n"
        + "4096,512,64,128x64 w4 s3 k2 unroll2,1.0,,,,,\n"
        + "4096,512,64,128x64 w4 s3 k2,1.0,,,,,wrong by design\n"
    )
    cublas, waiting, racing = measured.timings(tmp_path)
    tile = TileConfig(128, 64, 2, 4, 3, scale_weights=True, x_descriptor=True)
    assert (cublas.kernel, cublas.tile) == (None, None)
    assert (waiting.shape, waiting.tile, waiting.us) == (GemmShape(64, 4096, 512), tile, 7.0)
    assert [measured.is_right_form(each) for each in (cublas, waiting, racing)] == [
        *(False, True, False),
    ]


def test_a_label_without_a_tile_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiles.csv").write_text(HEADER + "4096,512,64,marlin,9.0,,,,,\n")
    with pytest.raises(ValueError, match=r"tiles.csv: no tile in 'marlin'"):
        list(measured.timings(tmp_path))


def test_the_command_prints_every_problem() -> None:
    done = CliRunner().invoke(best_tiles.app, [str(H200)])
    assert done.exit_code == 0, done.output
    assert "m=64 n=4096 k=4096: 11.67 us 64x64 split 2" in done.output
    assert done.output.splitlines()[-1].startswith("geometric mean 0.")
