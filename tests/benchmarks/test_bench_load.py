"""The loading benchmark measures every packing at every width, through the formats themselves."""

import csv
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bench_load
from bench_load import DEVICES, describe, measure
from random_layers import random_layers


def test_every_random_layer_loads_on_both_devices() -> None:
    descriptions = []
    for made in random_layers(64, 256, 128):
        layer = describe(made)
        assert (layer.n, layer.k) == (64, 256)
        descriptions.append(layer.description)
        for device in DEVICES:
            seconds, packed = measure(
                layer, made.tensors, device, 1, time.perf_counter, torch.device("cpu")
            )
            assert packed > 64 * 256 * layer.spec.weight_type.bits // 8
            assert len(seconds) == 1
    formats = {name.split()[0] for name in descriptions}
    assert formats == {"gptq", "awq", "compressed-tensors", "bitsandbytes"}
    widths = [sum(f"{bits}-bit" in name for name in descriptions) for bits in range(2, 9)]
    assert all(count >= 2 for count in widths)


def test_a_dry_run_writes_a_row_per_format_and_layout(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    arguments = ["--dry-run", "--only", "awq gemv", "--csv", str(file)]
    done = CliRunner().invoke(bench_load.app, arguments)
    assert done.exit_code == 0, done.output
    with file.open(newline="") as stream:
        rows = {
            (row["format"], row["device"]): float(row["packed_mb"])
            for row in csv.DictReader(stream)
        }
    names = ("awq gemv 4-bit", "awq gemv_fast 4-bit")
    assert set(rows) == {(name, device) for name in names for device in DEVICES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "tpu"), "unknown device 'tpu'; known: cpu, cuda"),
        (("--clock", "sun"), "unknown clock 'sun'; known: wall, cpu"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(bench_load.app, list(arguments))
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on() -> None:
    done = CliRunner().invoke(bench_load.app, ["--on", "cuda"])
    assert done.exit_code == 2
    assert "no CUDA device here; --on cpu packs on the CPU" in " ".join(done.output.split())
