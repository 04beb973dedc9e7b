"""The table of all that can be launched: a share of it, compiled here."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedq_kernels.audit import everything
from fusedq_kernels.audit.everything import Share
from fusedq_kernels.audit.fused import Variant
from fusedq_kernels.types import QuantSpec, TileConfig, WeightType

# Of some 11,000.
SHARE = "1/720"


def run(env: dict[str, str], path: Path, share: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--everything", "--csv", str(path), "--share", share, "--jobs", "2")
    command = [sys.executable, "-m", "fusedq_kernels.audit", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_share_of_everything_has_no_register_touched_too_early(compiler_env, tmp_path) -> None:
    path = tmp_path / "audit.csv"
    done = run(compiler_env, path, SHARE)
    found = lines(path)
    assert [line for line in found if "wgmma" in line["problems"]] == [], done.stderr
    assert {line["hazards"] for line in found} == {"0"}
    gemms = [line for line in found if line["kernel"] == "triton-gemm"]
    assert {line["running"] for line in gemms} == {"0"}
    assert {line["mma"] for line in gemms} >= {"wgmma"}
    assert {line["mma"] for line in found if line not in gemms} == {""}
    assert done.stdout.endswith(", 0 with registers touched under a running wgmma\n")


def test_an_interrupted_table_is_taken_up(compiler_env, tmp_path) -> None:
    path = tmp_path / "audit.csv"
    stamp = {"triton": everything.triton.__version__, "sources": everything.sources()}
    names = [
        (job.kernel, job.name)
        for job in everything.jobs(everything.device_by_name("sm_90"))
        if Share(1, 3000).holds(f"{job.kernel} {job.name}")
    ]
    assert len(names) > 2
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, everything._FIELDS, restval="1", lineterminator="\n")
        writer.writeheader()
        for kernel, variant in names[2:]:
            known = stamp | {"kernel": kernel, "variant": variant, "regs": "12345"}
            writer.writerow(known | {"hazards": "3", "problems": "some"})
        # Of other sources, of what no longer is, and half a line: all of no use.
        kernel, variant = names[0]
        writer.writerow(stamp | {"kernel": kernel, "variant": variant, "sources": "0"})
        writer.writerow(stamp | {"kernel": kernel, "variant": "no such", "problems": "none"})
        file.write(f"{stamp['triton']},{stamp['sources']},{names[1][0]},{names[1][1]},9")
    done = run(compiler_env, path, "1/3000")
    assert done.returncode == 1
    registers = {(line["kernel"], line["variant"]): line["regs"] for line in lines(path)}
    assert {*registers} == {*names}
    assert {registers[name] for name in names[2:]} == {"12345"}
    assert all(16 <= int(registers[name]) <= 255 for name in names[:2])
    assert f"{len(names)} binaries, {len(names) - 2} with a problem" in done.stdout
    assert f"{names[2][0]} {names[2][1]}: some" in done.stdout


def test_a_table_is_needed(compiler_env) -> None:
    command = [sys.executable, "-m", "fusedq_kernels.audit", "--everything"]
    done = subprocess.run(command, env=compiler_env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("--everything writes to --csv\n")


def test_shares_are_everything_once() -> None:
    names = [str(number) for number in range(1000)]
    shares = [[name for name in names if Share(1 + i, 8).holds(name)] for i in range(8)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert all(90 < len(share) < 160 for share in shares)
    assert Share.parse("2/8") == Share(2, 8)
    for text in ("0/8", "9/8"):
        with pytest.raises(ValueError, match="a share is 1/8 to 8/8, for example, got"):
            Share.parse(text)


def test_a_name_tells_all_that_differs() -> None:
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    tile = TileConfig(256, 128, 1, 8, 3, scale_weights=True, x_descriptor=True)
    name = everything.name_of(Variant(tile, spec, torch.bfloat16))
    assert name == "uint4b8 bf16 scale=fp16 g128 256x128s w8 s3 k1 x_descriptor bias"
    spec = QuantSpec(WeightType.NF4, 1 << 16, torch.float32)
    tile = TileConfig(8, 64, 16, 4, 4, segments=2, scale_steps=True)
    name = everything.name_of(Variant(tile, spec, torch.float16, has_bias=False))
    assert name == "nf4 fp16 scale=fp32 channel 8x64 w4 s4 k16 segments=2 scale_steps"
