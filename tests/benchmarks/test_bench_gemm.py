"""`bench_gemm.py --dry-run` as a user runs it, with every contender that loads on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bench_gemm
from gemmbench.results import COLUMNS, ResultFile, device_name

SCRIPT = Path(bench_gemm.__file__)
ARGUMENTS = ("--dry-run", "--phase", "decode", "--m", "1")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A complete dry run: its folder and output."""
    out = tmp_path_factory.mktemp("results")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *ARGUMENTS, "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def invoke(*arguments: str):
    return CliRunner().invoke(bench_gemm.app, arguments)


def plain(output: str) -> str:
    """Without the frame that typer draws and its line breaks."""
    return " ".join(output.replace("│", " ").split())


def test_every_contender_that_loads_is_timed_and_right(finished_run: tuple[Path, str]) -> None:
    rows = ResultFile(finished_run[0] / "gemm_decode.csv").rows()
    by_kernel = {row["kernel"]: row for row in rows if row["n"] == "128"}
    assert {row["group_size"] for row in rows} == {"128", "32"}
    everywhere = {"fusedq", "cublas", "dequant+cublas", "dequant+tiled", "load-only"}
    assert everywhere | {"without-dequant", "dequant-twice"} <= set(by_kernel)
    for row in rows:
        assert float(row["us"]) > 0
    for kernel in everywhere - {"load-only"}:
        assert float(by_kernel[kernel]["rms_error"]) < 1e-2
    assert float(by_kernel["cublas"]["vs_cublas"]) == 1
    assert {row["layers"] for row in rows} == {"dry-run/square", "dry-run/wide"}


@pytest.mark.parametrize("group_size", [128, 32])
def test_bytes_are_those_of_the_packed_weight_and_of_both_passes(
    finished_run: tuple[Path, str], group_size: int
) -> None:
    rows = ResultFile(finished_run[0] / "gemm_decode.csv").rows()
    problem = {"n": "128", "group_size": str(group_size)}
    dram = {row["kernel"]: row["dram_mb"] for row in rows if problem.items() <= row.items()}
    # Scales take 2 bytes.
    packed = 128 * 256 // 2 + 256 // group_size * 128 * 2
    moved = packed + 2 * (256 + 128)
    assert float(dram["fusedq"]) == round(moved / 1e6, 3)
    assert float(dram["dequant+cublas"]) == round((moved + 2 * 2 * 128 * 256) / 1e6, 3)


def test_the_file_says_what_ran_and_what_was_skipped(finished_run: tuple[Path, str]) -> None:
    out, output = finished_run
    text = (out / "gemm_decode.csv").read_text()
    for name in ("run", "date", "device", "torch", "triton", "commit", "command", "contenders"):
        assert f"# {name}: " in text
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert f"# device: {device_name(device)}\n" in text
    assert ",".join(COLUMNS) in text
    assert "not for uint4b8 128x256: bitsandbytes: " in output or "skipped bitsandbytes" in output
    assert "marlin: MarlinLinearKernel is not for this platform" in output


def test_a_second_run_measures_nothing_again(finished_run: tuple[Path, str]) -> None:
    out, _ = finished_run
    before = (out / "gemm_decode.csv").read_text()
    done = invoke(*ARGUMENTS, "--out", str(out), "--contender", "fusedq")
    assert done.exit_code == 0, done.output
    assert "[1/" not in done.output
    assert (out / "gemm_decode.csv").read_text() == before


def test_a_run_out_of_time_says_what_remains(tmp_path: Path) -> None:
    options = ("--out", str(tmp_path), "--contender", "fusedq", "--seconds", "0")
    done = invoke(*ARGUMENTS, *options)
    assert done.exit_code == 0, done.output
    assert "4 problems remain: run it again" in done.output
    assert not (tmp_path / "gemm_decode.csv").exists()


def test_the_roofline_stands_beside_what_was_measured(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "") | {
        **{"weight_type": "uint4b8", "group_size": 128, "act_dtype": "bfloat16"},
        **{"n": 4096, "k": 4096, "m": 1, "kernel": "fusedq", "us": 9.8},
    }
    ResultFile(tmp_path / "gemm_decode.csv").append([row], {})
    options = ("--shapes", "tiny-gemm", "--phase", "decode", "--m", "1", "--out", str(tmp_path))
    done = invoke("--roofline", *options)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "9.8" in line]
    cells = [cell.strip() for cell in line.replace("┃", "│").split("│")]
    assert cells[:5] == ["uint4b8", "128", "4096", "4096", "1"]
    assert float(cells[-1]) == pytest.approx(9.8 / float(cells[6]), abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on() -> None:
    done = invoke()
    assert done.exit_code == 2
    assert "no CUDA device here; --dry-run exercises everything" in plain(done.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--roofline", "--shapes", "llama-9"), "unknown shapes 'llama-9'; known: llama-3-8b"),
        (("--roofline", "--weight-type", "int4"), "unknown weight type 'int4'; known: uint4, "),
        (("--dry-run", "--contender", "cutlass"), "unknown contenders ['cutlass']; known: fusedq"),
        (("--roofline", "--tp", "3"), "heads 32 is not divisible by tensor-parallel size 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in plain(done.output)
