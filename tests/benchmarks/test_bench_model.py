"""The section of docs/bench.md is what the committed rows say."""

from pathlib import Path

import pytest

import bench_model
from gemmbench.results import ROOT, ResultFile

COMMITTED = sorted((ROOT / "benchmarks" / "results" / "cpu").glob("bench.csv"))
ROW = {"layers": "a", "format": "awq", "kernel": "cpu-fused", "out_features": 8, "in_features": 8}


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_the_page_is_that_of_the_rows(file: Path) -> None:
    page = bench_model.PAGE.read_text()
    assert bench_model.with_section(page, file) == page


def test_the_table_adds_layers_up(tmp_path: Path) -> None:
    numbers = {"us": "20", "unquantized_us": "50", "weight_bytes": "40000", "read_gbs": "4"}
    rows = [
        {**numbers, "count": "2", "tokens": "1", "decoding": "0.5"},
        {**numbers, "count": "1", "tokens": "1", "decoding": "-0.1"},
        {**numbers, "count": "1", "tokens": "2048", "decoding": "0"},
    ]
    file = ResultFile(tmp_path / "bench.csv", bench_model.COLUMNS)
    file.append(
        [ROW | row for row in rows],
        {"command": "x", "date": "2026-01-02T", "torch": "2"} | {"commit": "c", "device": "a CPU"},
    )
    before = "# Page\n\nText.\n"
    page = bench_model.with_section(before, file.path)
    assert page.startswith(before + "\n## Measured\n")
    assert (
        "| 1 | 0.1 | 0.1 | 2.50 | 2.0 | 50 | 30 |\n| 2,048 | 0.0 | 0.1 | 2.50 | 2.0 | 50 | 0 |\n"
        in page
    )
    assert "on\na CPU." in page
    # Written again it is the same
    assert bench_model.with_section(page, file.path) == page
