"""`serve_compare.py`: a real engine in its dry run, and what it makes of answers and logs."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import serve_compare
from gemmbench.results import ResultFile

LOG = """
INFO [default_loader.py:502] Loading weights took 1.52 seconds
INFO [gpu_model_runner.py:5150] Model loading took 5.39 GiB memory and 2.601234 seconds
INFO [live.py:90] fusedq loading: 1.40 s, ... repacking: 0.81 s, ... warm-up: 3.25 s, ...
INFO [monitor.py:20] torch.compile took 11.20 s in total
INFO [gpu_model_runner.py:6582] Graph capturing finished in 9 secs, took 0.52 GiB
INFO [core.py:396] init engine (profile, create kv cache, warmup model) took 31.07 s (comp...
"""


def plain(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def test_metrics_are_medians_of_the_answer_and_the_log_taken_apart() -> None:
    answer = {
        "start_s": 61.234,
        "kernels": {"MacheteLinearKernel": 128},
        "decode-8": [100.0, 130.0, 110.0],
        "prefill-512": [5000.0],
    }
    rows = serve_compare.metrics(answer, LOG)
    assert {row["metric"]: row["value"] for row in rows} == {
        **{"start_s": 61.23, "load_read_s": 1.52, "load_total_s": 2.601, "memory_gib": 5.39},
        **{"repack_s": 0.81, "warm_up_s": 3.25},
        **{"graph_capture_s": 9.0, "compile_s": 11.2, "init_engine_s": 31.07},
        **{"decode-8_tok_s": 110.0, "prefill-512_tok_s": 5000.0},
    }
    assert {row["metric"]: row.get("spread") for row in rows}["decode-8_tok_s"] == 15.0
    assert {row["kernels"] for row in rows} == {"MacheteLinearKernel:128"}


def test_ratios_set_fusedq_beside_every_other_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ResultFile(tmp_path / "serving.csv", serve_compare.COLUMNS)
    for side, value in (("stock", 90.0), ("stock", 100.0), ("bf16", 50.0), ("fusedq", 120.0)):
        row = {"model": "m", "layout": "gptq", "metric": "decode-1_tok_s", "kernels": ""}
        file.append([{**row, "side": side, "value": value}], {})
    serve_compare.print_ratios(file)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "decode-1_tok_s" in line]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells == ["m", "gptq", "decode-1_tok_s", "120", "1.200", "", "2.400"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run", "--side", "sglang"), "unknown ['sglang']; known: stock, marlin, bf16"),
        (("--dry-run", "--layout", "exl3"), "unknown ['exl3']; known: gptq, awq, compressed-"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(serve_compare.app, arguments)
    assert done.exit_code == 2
    assert message in plain(done.output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on() -> None:
    done = CliRunner().invoke(serve_compare.app, [])
    assert done.exit_code == 2
    assert "no CUDA device here; --dry-run serves a tiny model" in plain(done.output)


@pytest.mark.engine
def test_a_dry_run_serves_names_the_kernels_and_resumes(tmp_path: Path) -> None:
    arguments = ["--dry-run", "--side", "fusedq", "--out", str(tmp_path), "--work"]
    done = CliRunner().invoke(serve_compare.app, [*arguments, str(tmp_path / "work")])
    assert done.exit_code == 0, done.output
    rows = ResultFile(tmp_path / "serving.csv", serve_compare.COLUMNS).rows()
    values = {row["metric"]: float(row["value"]) for row in rows}
    assert {"decode-1_tok_s", "decode-2_tok_s", "prefill-16_tok_s", "load_read_s"} <= set(values)
    timed = {name for name, value in values.items() if value > 0}
    # Neither repacking a tiny model nor warming up a CPU takes a hundredth of a second
    assert set(values) - timed <= {"repack_s", "warm_up_s"}
    # Two blocks of four fused layers.
    assert all("cpu-wna16:8" in row["kernels"] for row in rows)
    again = CliRunner().invoke(serve_compare.app, [*arguments, str(tmp_path / "work")])
    assert again.exit_code == 0
    assert "[1/" not in again.output
