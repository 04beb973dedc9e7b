"""The figures show the numbers of the CSV files and need nothing else."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemmbench.results import ResultFile
from result_rows import DECODE_FACTORS, SHAPES, streaming_us, write_results

pytest.importorskip("matplotlib", reason="the bench extra is not installed")
pytest.importorskip("pandas", reason="the bench extra is not installed")

from matplotlib.axes import Axes

import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    write_results(path)
    return path


def drawn(axis: Axes, label: str) -> dict[float, float]:
    """The points of one line."""
    (line,) = [line for line in axis.get_lines() if line.get_label() == label]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_every_figure_is_written(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(plots.app, [str(folder), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for name in plots.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == PNG


def test_titles_name_weights_and_device(folder: Path) -> None:
    path = folder / "gemm_decode.csv"
    what, weights = plots.title_of("Speed", plots.load(path), "a GPU").split("\n")
    assert what == "Speed"
    assert "uint4b8 in groups of 128" in weights
    assert weights.endswith("; a GPU")


def test_speedup_is_the_ratio_to_cublas_by_width(folder: Path) -> None:
    figure = plots.speedup_against_n(plots.load(folder / "gemm_decode.csv"))
    assert [axis.get_title() for axis in figure.axes] == ["M = 1", "M = 16", "M = 64"]
    points = drawn(figure.axes[0], "marlin")
    assert sorted(points) == sorted({n for n, _ in SHAPES})
    expected = DECODE_FACTORS["cublas"] / DECODE_FACTORS["marlin"]
    assert list(points.values()) == pytest.approx([expected] * len(points), rel=1e-3)


def test_percent_of_peak_is_relative_to_the_twin(folder: Path) -> None:
    figure = plots.percent_of_peak(plots.load(folder / "gemm_decode.csv"))
    points = drawn(figure.axes[0], "fusedq")
    assert points[16] == pytest.approx(100 * 1.05 / 1.15, rel=1e-3)
    assert sorted(points) == [1, 4, 16, 64]


def test_breakdown_shows_the_three_kernels_per_shape(folder: Path) -> None:
    figure = plots.dequant_breakdown(plots.load(folder / "gemm_decode.csv"))
    (axis,) = figure.axes
    shown = [label.get_text().split("\n")[1] for label in axis.get_xticklabels()]
    at = shown.index("28672 x 4096")
    heights = [bars[at].get_height() for bars in axis.containers]
    base = streaming_us(28672, 4096) * (1 + 1 / 128)
    assert heights == pytest.approx([base * 1.1, base * 1.15, base * 1.45], rel=1e-3)


def test_bandwidth_has_a_line_per_layer(folder: Path) -> None:
    figure = plots.bandwidth_against_m(plots.load(folder / "gemm_decode.csv"))
    points = drawn(figure.axes[0], "4096 x 14336")
    assert points[1] == pytest.approx(4000 / 1.15 / (1 + 1 / 128), rel=1e-3)


def test_crossover_shows_where_dequantizing_first_wins(folder: Path) -> None:
    figure = plots.prefill_crossover(plots.load(folder / "gemm_prefill.csv"))
    ours, unfused = (drawn(figure.axes[0], name) for name in ("fusedq", "dequant+cublas"))
    assert [m for m in sorted(ours) if unfused[m] > ours[m]] == [2048, 8192]


def test_the_last_run_of_a_problem_counts_and_failures_do_not(tmp_path: Path) -> None:
    row = {"weight_type": "nf4", "group_size": 64, "act_dtype": "float16", "n": 8, "k": 8, "m": 1}
    file = ResultFile(tmp_path / "gemm_decode.csv")
    for us in (5.0, 4.0, ""):
        kernel = "fusedq" if us else "marlin"
        file.append([{**row, "kernel": kernel, "us": us}], {"date": "today"})
    frame = plots.load(file.path)
    assert list(frame["us"]) == [4.0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    # Wide enough that no line breaks inside a name.
    done = CliRunner().invoke(plots.app, [str(tmp_path)], env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert "gemm_decode.csv" in done.output
