"""What a launch costs: every part is timed of a kernel that was really compiled for sm_90."""

import csv
import subprocess
import sys
from pathlib import Path

import bench_gemm

SCRIPT = Path(bench_gemm.__file__).with_name("bench_launch.py")
PARTS = {
    "whole call of matmul_out",
    "of it, without the dispatch",
    "of it, checking operands",
    "of it, finding what runs",
    "of it, launching",
}


def run(compiler_env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=compiler_env
    )


def test_a_dry_run_times_every_part_of_the_chosen_launch(
    tmp_path: Path, compiler_env: dict[str, str]
) -> None:
    file = tmp_path / "launch.csv"
    # Compiled anew, and seen in the cache: the interpreter would leave nothing there.
    env = compiler_env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run(env, "--dry-run", "--label", "here", "--csv", str(file))
    assert done.returncode == 0, done.stderr
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["part"] for row in rows} == PARTS
    assert {(row["label"], row["layer"], row["tokens"]) for row in rows} == {
        ("here", "256x512", "1")
    }
    assert all(row["launch"].startswith("rule: ") for row in rows)
    times = {row["part"]: float(row["us"]) for row in rows}
    assert times["whole call of matmul_out"] > 0
    (cubin,) = (tmp_path / "cache").rglob("fused_gemm*.cubin")
    assert cubin.stat().st_size > 1000


def test_a_device_that_is_not_there_is_named(compiler_env: dict[str, str]) -> None:
    done = run(compiler_env | {"CUDA_VISIBLE_DEVICES": ""}, "--on", "cuda")
    assert done.returncode == 2
    assert "no CUDA device here; --on cpu fakes its driver" in done.stderr
    done = run(compiler_env, "--on", "tpu")
    assert done.returncode == 2
    assert "unknown device 'tpu'; known: cpu, cuda" in done.stderr
