"""The figures of two runs show the numbers of the result files, each run's apart."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the bench extra is not installed")

import plot_runs
from gemmbench import measured
from gemmbench.results import RESULTS

H200 = RESULTS / "h200"


def test_both_figures_are_written(tmp_path: Path) -> None:
    for path in (*H200.glob("*.csv"), *H200.glob("*.json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = CliRunner().invoke(plot_runs.app, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in plot_runs.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_kernels_are_drawn_against_the_cublas_of_their_run() -> None:
    (axis,) = plot_runs.kernels(H200).axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert "fusedq (run 1, as it was)" in lines
    (changed,) = (line for label, line in lines.items() if "run 2, experimental kernel, b" in label)
    points = dict(zip(changed.get_xdata(), changed.get_ydata(), strict=True))
    # The four layers at 64 tokens: 15.543, 11.674, 36.845, 24.844 us; cuBLAS at least 16.174,
    # 11.855, 62.075, 36.182.
    ratios = (16.174 / 15.543) * (11.855 / 11.674) * (62.075 / 36.845) * (36.182 / 24.844)
    assert points[64] == pytest.approx(ratios**0.25, rel=1e-4)
    assert max(points) == 8192


def test_a_form_that_races_is_not_shown() -> None:
    best = plot_runs.best(H200, measured.is_right_form)
    assert best[4096, 4096, 2048] == pytest.approx(107.407)  # 100.124 without the wait


def test_serving_is_drawn_as_a_ratio_within_each_run() -> None:
    decode, prefill = plot_runs.serving(H200).axes
    sides = json.loads((H200 / "serving-with-changes.json").read_text())
    stock, ours = (sides[side]["prefill-512_tok_s"][0] for side in ("stock", "fusedq"))
    heights = {round(bar.get_height(), 6) for bar in prefill.patches}
    assert round(ours / stock, 6) in heights
    assert [label.get_text() for label in decode.get_xticklabels()] == [
        *("1", "8", "16", "32", "64", "128")
    ]
