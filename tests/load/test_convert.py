"""Converted checkpoints: the same resident bits at every split; whole, or not there at all."""

import errno
import fcntl
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints import ALL_BUILDS, Tensors, replace, write_checkpoint, write_json
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts.packing import unpack
from heads import config_with_head, quantized_head
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.cli import app
from vllm_fusedq.errors import (
    CheckpointError,
    OutputError,
    PreflightError,
    UnsupportedCheckpoint,
    WeightLoadError,
)
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model

TARGETS = {
    "cpu": Target(cpu_device(), torch.float16, keeps_activations=True),
    "wna16": Target(cpu_device(), torch.float16, "cpu-wna16", keeps_activations=True),
    "gpu": Target(device_by_name("h200"), torch.float16, keeps_activations=True),
}
# Ranks begin inside groups and inside blocks of 128, and on their borders.
SIZES = {"hidden": 256, "intermediate": 384, "group_size": 32}
DOWN = "model.layers.0.mlp.down_proj"
RESIDENT = ("qweight", "scales", "zeros", "perm")


def load(checkpoint: Checkpoint, device: str, tp_size: int, rank: int) -> dict[str, LayerLoader]:
    target = TARGETS[device]
    loaders = {}
    for plan in plan_model(checkpoint, target, tp_size, ranks=[rank]).layers:
        loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
        for part, fmt in zip(plan.shard.parts, plan.formats, strict=True):
            for stored in fmt.tensors:
                name = f"{part.module}.{stored.name}"
                path = Path(checkpoint.path) / checkpoint.tensors[name].file
                with safe_open(path, "pt") as file:
                    loader.add(stored.name, file.get_tensor(name), part.shard_id)
        loader.check_complete()
        loaders[plan.prefix] = loader
    return loaders


def assert_equal(found: dict[str, LayerLoader], wanted: dict[str, LayerLoader]) -> None:
    assert found.keys() == wanted.keys()
    for prefix, loader in found.items():
        for name in RESIDENT:
            a, b = getattr(loader.packed, name), getattr(wanted[prefix].packed, name)
            assert (a is None) == (b is None), (prefix, name)
            assert a is None or torch.equal(a, b), (prefix, name)


@pytest.mark.parametrize("build", ALL_BUILDS)
def test_every_rank_holds_the_same_bits(tmp_path: Path, build: str) -> None:
    write_checkpoint(tmp_path / "source", build, **SIZES)
    convert(tmp_path / "source", tmp_path / "out", keeps_activations=True)
    source, out = read_checkpoint(tmp_path / "source"), read_checkpoint(tmp_path / "out")
    for device in ("cpu", "gpu"):
        for tp_size, ranks in ((1, [0]), (2, [1]), (4, [1, 3])):
            for rank in ranks:
                try:
                    wanted = load(source, device, tp_size, rank)
                except PreflightError:
                    # A packing that this split would cut; what is converted has no such bounds
                    load(out, device, tp_size, rank)
                    continue
                assert_equal(load(out, device, tp_size, rank), wanted)


def test_what_is_stored_as_it_stays_resident_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source", "gptq-asym", **SIZES)
    convert(tmp_path / "source", tmp_path / "out")
    out = read_checkpoint(tmp_path / "out")
    decoded = []
    original = LayerLoader._repack
    monkeypatch.setattr(
        LayerLoader,
        "_repack",
        lambda self: decoded.append(self.plan.prefix) or original(self),
    )
    load(out, "gpu", 1, 0)
    assert decoded == []
    # 384 / 2 = 192 rows end inside a block of 128
    load(out, "gpu", 2, 0)
    assert decoded == [DOWN]


def test_lm_head_biases_and_other_files_come_along(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _, edit = quantized_head("gptq-sym", SIZES["hidden"])
    config = config_with_head("gptq-sym")

    def bias(tensors: Tensors) -> None:
        tensors[f"{DOWN}.bias"] = torch.arange(SIZES["hidden"]).half()

    write_checkpoint(source, "gptq-sym", edits=[edit, bias], config=config, **SIZES)
    (source / "tokenizer.json").write_text("{}")
    (source / "quantize_config.json").write_text("{}")
    convert(source, out)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json")
    }
    for rank in (0, 1):
        args = ("cpu", 2, rank)
        assert_equal(load(read_checkpoint(out), *args), load(read_checkpoint(source), *args))
    stored = load_file(out / "model.safetensors")
    before = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", f"{DOWN}.bias", "model.norm.weight"):
        assert torch.equal(stored[name], before[name])
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["layout_version"] == 1
    assert section["source"]["quant_method"] == "gptq"
    assert section["source"]["config"]["bits"] == 4
    assert set(section["source"]["sha256"]) == {"config.json", "model.safetensors"}


def test_layout_version_1_holds_plain_scales_whatever_stays_resident(tmp_path: Path) -> None:
    """What a release wrote, a later one reads: scales `[G, N]`, two rows of which share a word."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, "gptq-sym", **SIZES)
    convert(source, out)
    stored, before = (load_file(path / "model.safetensors") for path in (out, source))
    # GPTQ has them the same way round.
    scales = before[f"{DOWN}.scales"]
    assert scales.shape == (SIZES["intermediate"] // 32, SIZES["hidden"])
    assert torch.equal(stored[f"{DOWN}.scales"], scales)
    assert stored[f"{DOWN}.qweight"].shape == (SIZES["intermediate"] // 128, SIZES["hidden"], 16)
    for rank, groups in ((0, slice(0, 6)), (1, slice(6, 12))):
        loader = load(read_checkpoint(out), "gpu", 2, rank)[DOWN]
        assert loader.packed.scales.shape == (2, SIZES["hidden"] // 2, 4)
        logical = unpack(loader.packed)
        # The second rank begins in the middle of a block: its six groups fill one and a half.
        assert torch.equal(logical.scales, scales[groups].T)


KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_fusedq.load.convert import convert
def show(what, done, total):
    if what == "converting" and done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), show)
"""


def test_a_killed_run_leaves_nothing_that_loads_and_is_begun_again(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, "ct-asym", **SIZES)
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), "60000"])
    assert done.returncode == -9
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert list(partial.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=r"no config\.json there: not a checkpoint"):
        read_checkpoint(partial)
    # Another source with other sizes: nothing of the killed run may stay
    write_checkpoint(source, "ct-sym", **SIZES)
    result = CliRunner().invoke(app, ["convert", str(source), str(out)])
    assert result.exit_code == 0
    assert result.stderr == f"begun again: {partial} held files of a killed run\n"
    assert not partial.exists()
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    before, after = read_checkpoint(source), read_checkpoint(out)
    assert_equal(load(after, "gpu", 1, 0), load(before, "gpu", 1, 0))


def test_one_folder_takes_one_conversion_at_a_time(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, "ct-asym", **SIZES)

    def meanwhile(what: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match=r"out\.partial: another conversion is writing there"):
            convert(source, out)
        refused.append(what)

    refused: list[str] = []
    convert(source, out, 60000, progress=meanwhile)
    assert set(refused) == {"hashing", "converting"}
    assert not list(out.glob("convert.*"))
    assert_equal(*(load(read_checkpoint(path), "gpu", 1, 0) for path in (out, source)))


@pytest.mark.parametrize("left", [(), ("convert.lock",)])
def test_a_run_killed_before_its_first_file_is_begun_again(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    write_checkpoint(tmp_path / "source", "awq", **SIZES)
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).touch()
    convert(tmp_path / "source", tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").tensors


def test_a_partial_folder_that_no_conversion_made_stays_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "awq", **SIZES)
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("dear")
    with pytest.raises(CheckpointError, match=r"out\.partial: exists, and no conversion made it"):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_without_locks_a_folder_that_was_begun_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, "awq", **SIZES)

    def meanwhile(what: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="and this file system has no locks to tell whether"):
            convert(source, out)
        refused.append(what)

    refused: list[str] = []
    convert(source, out, progress=meanwhile)
    assert set(refused) == {"hashing", "converting"}
    assert_equal(*(load(read_checkpoint(path), "gpu", 1, 0) for path in (out, source)))


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source, "awq", **SIZES)
    (tmp_path / "file").touch()
    arguments = ["convert", str(source), str(tmp_path / "file" / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert "out.partial: cannot be written: Not a directory; make room or" in result.output
    # A disk without room stops a write the same way, but for the reason's name
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        result = CliRunner().invoke(app, ["convert", str(source), str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 3
    assert result.stderr == (
        f"{out}.partial: cannot be written: File too large; make room or choose another folder\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"source", "file"}
    result = CliRunner().invoke(app, ["convert", str(source), str(out)])
    assert result.exit_code == 0, result.output
    assert_equal(*(load(read_checkpoint(path), "gpu", 1, 0) for path in (out, source)))


def test_a_source_file_that_goes_away_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, "awq", **SIZES)
    weights = source / "model.safetensors"
    gone = lambda what, done, total: weights.unlink(missing_ok=True)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        convert(source, tmp_path / "out", progress=gone)


def test_a_mislabelled_source_is_told_and_a_contradictory_one_refused(tmp_path: Path) -> None:
    source, mixed = tmp_path / "source", tmp_path / "mixed"
    options = {**SIZES, "config": {"checkpoint_format": "gptq"}}
    write_checkpoint(source, "gptq-sym-v2", **options)
    done = convert(source, tmp_path / "out", 60000)
    assert done.note.startswith("The config says gptq, the values say gptq_v2 (")
    assert done.note.endswith("): 7 layers are read as gptq_v2.")
    lower = replace(f"{DOWN}.qzeros", lambda tensor: tensor - 0x11111111)
    write_checkpoint(mixed, "gptq-sym-v2", edits=[lower], **options)
    with pytest.raises(WeightLoadError, match="found layers that were stored in different ways"):
        convert(mixed, tmp_path / "none", 60000)
    assert not list(tmp_path.glob("none*"))


def test_an_existing_folder_and_a_converted_source_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "awq", **SIZES)
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "source"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "out: 7 layers converted, 0." in result.output
    with pytest.raises(CheckpointError, match="out: exists; remove it"):
        convert(tmp_path / "source", tmp_path / "out")
    with pytest.raises(UnsupportedCheckpoint, match="is converted already; serve it as it is"):
        convert(tmp_path / "out", tmp_path / "again")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_checkpoint(folder / "source", "gptq-asym-order", **SIZES)
    convert(folder / "source", folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layout_version": 2},
            "found layout_version 2; supported by fusedq: layout_version 1; co",
        ),
        ({"layout_version": True}, "found layout_version True; supported"),
        ({"modules": {}}, "a config without schemes or modules"),
        ({"schemes": {}}, "a config without schemes or modules"),
        ({"schemes": [3]}, "found the scheme 3; supported by fusedq: weight_type uint4, "),
        (
            {"schemes": [{"weight_type": "uint4", "group_size": 0, "ordered": True}]},
            "supported by fusedq: a group_size, ordered and row_scaled true or false",
        ),
        ({"modules": {DOWN: [7, 256, 384]}}, rf"{DOWN} as \[7, 256, 384\]; .*a scheme and sizes"),
        ({"modules": {DOWN: [0, 256]}}, rf"{DOWN} as \[0, 256\]; .*scheme, N and K"),
    ],
)
def test_a_config_of_another_making_is_refused(
    converted: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((converted / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "model.safetensors").symlink_to(converted / "model.safetensors")
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        plan_model(read_checkpoint(tmp_path), TARGETS["gpu"])


def test_a_module_whose_tensors_are_gone_is_missed(converted: Path, tmp_path: Path) -> None:
    tensors = load_file(converted / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if DOWN not in name}
    save_file(left, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(converted / "config.json")
    with pytest.raises(PreflightError, match=rf"{DOWN}: found no packed tensors \(found: none\)"):
        plan_model(read_checkpoint(tmp_path), TARGETS["gpu"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("zeros", 16, f"{DOWN}.zeros: found the zero point 16, expected less than 16; convert"),
        ("perm", 0, f"{DOWN}.perm: found in_features twice or out of range, expected each of 384"),
    ],
)
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_values_that_cannot_be_right_are_refused(
    converted: Path, tmp_path: Path, name: str, value: int, message: str, device: str
) -> None:
    tensors = load_file(converted / "model.safetensors")
    tensors[f"{DOWN}.{name}"].view(-1)[:2] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(converted / "config.json")
    with pytest.raises(WeightLoadError, match=message):
        load(read_checkpoint(tmp_path), device, 1, 0)


def test_codes_of_nan_are_refused_where_they_lie_and_where_they_are_decoded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "ct-float-channel", **SIZES)
    convert(tmp_path / "source", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[f"{DOWN}.qweight"].view(torch.uint8)[0, 3, 5] = 0xFF
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    for tp_size in (1, 2):
        with pytest.raises(WeightLoadError, match=f"{DOWN}.qweight: found 1 codes of NaN"):
            load(read_checkpoint(tmp_path / "out"), "gpu", tp_size, 0)
