"""Each experiment's dry run, and that the variants are what they say."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import experiments
from gemmbench.experiments import EXPERIMENTS
from gemmbench.numerics import COLUMNS
from gemmbench.results import ResultFile

TIMED = [number for number, each in EXPERIMENTS.items() if each.numerics is None]
# Contenders that run on a CPU
EVERYWHERE = {
    *("fusedq", "fusedq-sliced", "cublas", "dequant+cublas"),
    *("without-dequant", "dequant-twice"),
}


def dry_run(number: int, folder: Path) -> str:
    done = CliRunner().invoke(experiments.app, [str(number), "--dry-run", "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("number", TIMED)
def test_every_variant_is_timed_and_right(tmp_path: Path, number: int) -> None:
    experiment = EXPERIMENTS[number]
    output = dry_run(number, tmp_path)
    assert experiment.prediction in output
    assert experiment.refuted_by in output
    rows = ResultFile(tmp_path / f"experiment-{number}.csv").rows()
    problems = {(row["weight_type"], row["group_size"], row["act_dtype"]) for row in rows}
    assert len(problems) == len(experiment.cases)
    expected = {each.name for each in experiment.variants} | (EVERYWHERE & {*experiment.names})
    for problem in problems:
        found = {
            row["kernel"]: row
            for row in rows
            if (row["weight_type"], row["group_size"], row["act_dtype"]) == problem
        }
        without = {"without-dequant", "dequant-twice"} if problem[0] == "uint4" else set()
        assert expected - without <= set(found)
        for name in expected - without:
            assert float(found[name]["us"]) > 0, found[name]["detail"]
    wrong_by_design = {"without-dequant", "dequant-twice"}
    for row in rows:
        if row["rms_error"] and row["kernel"] not in wrong_by_design:
            assert float(row["rms_error"]) < 1e-2


def test_tiles_do_not_change_a_bit(tmp_path: Path) -> None:
    dry_run(3, tmp_path)
    rows = ResultFile(tmp_path / "experiment-3.csv", COLUMNS).rows()
    assert len({row["variant"] for row in rows}) == len(rows) >= 8
    assert {row["value"] for row in rows} == {"0"}


def test_the_accumulation_error_is_seen_below_the_rounding_of_y(tmp_path: Path) -> None:
    """fp32 sums are exact to 1e-7 where y itself is rounded to 1.65e-3."""
    dry_run(5, tmp_path)
    rows = ResultFile(tmp_path / "experiment-5.csv", COLUMNS).rows()
    errors = {(row["act_dtype"], row["variant"]): float(row["value"]) for row in rows}
    raw = errors.pop(("bfloat16", "magic number left in"))
    assert len(errors) == 6
    assert 0 < min(errors.values()) <= max(errors.values()) < 5e-7
    assert raw > 3 * max(errors.values())


def test_a_second_run_measures_nothing_again(tmp_path: Path) -> None:
    dry_run(4, tmp_path)
    file = tmp_path / "experiment-4.csv"
    before = file.read_text()
    dry_run(4, tmp_path)
    assert file.read_text() == before


def test_without_numbers_it_lists_every_question() -> None:
    done = CliRunner().invoke(experiments.app, [])
    assert done.exit_code == 0
    for number, each in EXPERIMENTS.items():
        assert f"{number}. {each.title}" in done.output


def plain(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def test_wrong_numbers_and_a_missing_gpu_are_named() -> None:
    done = CliRunner().invoke(experiments.app, ["12", "--dry-run"])
    assert done.exit_code == 2
    assert "no experiment [12]; there are 1 to 11" in plain(done.output)
    if not torch.cuda.is_available():
        done = CliRunner().invoke(experiments.app, ["1"])
        assert done.exit_code == 2
        assert "no CUDA device here; --dry-run runs every variant" in plain(done.output)
