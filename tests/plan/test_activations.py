"""Checkpoints that quantize activations too: refused, or their weights alone by consent."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from checkpoints import Edit, add, write_checkpoint
from fusedq_kernels.choose.device import cpu_device
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.cli import app
from vllm_fusedq.errors import PreflightError, UnsupportedCheckpoint
from vllm_fusedq.load.convert import convert
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model

TARGET = Target(cpu_device(), torch.bfloat16)
CONSENTING = Target(cpu_device(), torch.bfloat16, keeps_activations=True)
QKV = "model.layers.0.self_attn.qkv_proj"


def inputs(path: Path, build: str = "ct-int8-sym", **quantized: Any) -> Checkpoint:
    """A checkpoint whose inputs are quantized, by scales that it stores where they are static."""
    write_checkpoint(path, build)
    config = read_checkpoint(path).quant_config
    config["config_groups"]["group_0"]["input_activations"] = quantized
    edits: list[Edit] = []
    if not quantized.get("dynamic"):
        module = "model.layers.0.mlp.down_proj"
        edits = [
            add(f"{module}.input_scale", torch.ones(1)),
            add(f"{module}.input_zero_point", torch.zeros(1, dtype=torch.int8)),
        ]
    write_checkpoint(path, build, config=config, edits=edits)
    return read_checkpoint(path)


def test_quantized_activations_are_refused_with_the_way_out(tmp_path: Path) -> None:
    checkpoint = inputs(tmp_path, num_bits=8, type="int", dynamic=True)
    with pytest.raises(PreflightError) as error:
        plan_model(checkpoint, TARGET)
    assert {problem.layer for problem in error.value.problems} >= {QKV}
    assert re.search(
        r"found quantized activations \(8-bit int\) beside quantized weights; supported: "
        r'activations in 16 bits; set "activations": "16-bit" in additional-config "fusedq" .*'
        "weight-only scheme",
        str(error.value),
    )


@pytest.mark.parametrize("dynamic", [True, False])
def test_by_consent_the_weights_are_planned_and_the_plan_says_it(
    tmp_path: Path, dynamic: bool
) -> None:
    checkpoint = inputs(tmp_path, num_bits=8, type="int", dynamic=dynamic)
    plan = plan_model(checkpoint, CONSENTING)
    assert len(plan.layers) == 4
    for layer in plan.layers:
        assert layer.formats[0].description.endswith(", activations in 16 bits, not 8-bit int")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("fp8-block", "8-bit float, dynamic"),
        ("fp8-tensor", "8-bit float, dynamic"),
        ("fbgemm-fp8", "8-bit float, per token"),
    ],
)
def test_what_always_quantizes_activations_asks_for_consent(
    tmp_path: Path, build: str, said: str
) -> None:
    write_checkpoint(tmp_path, build)
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(PreflightError, match=rf"quantized activations \({said}\) beside"):
        plan_model(checkpoint, TARGET)
    for layer in plan_model(checkpoint, CONSENTING).layers:
        assert layer.formats[0].description.endswith(f", activations in 16 bits, not {said}")


def test_consent_changes_nothing_where_weights_alone_are_quantized(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "ct-int8-sym")
    checkpoint = read_checkpoint(tmp_path)
    plans = [plan_model(checkpoint, target) for target in (TARGET, CONSENTING)]
    assert plans[0].layers == plans[1].layers
    assert "activations" not in plans[0].layers[0].formats[0].description


def test_commands_ask_for_the_same_consent(tmp_path: Path) -> None:
    inputs(tmp_path / "model", num_bits=8, dynamic=False)
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    consent = ["--activations", "16-bit"]
    for command in (["check", model], ["selfcheck", model], ["convert", model, out]):
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 1, refused.output
        assert "quantized activations (8-bit int)" in re.sub(r"\s+", " ", refused.output)
        done = CliRunner().invoke(app, command + consent)
        assert done.exit_code == 0, done.output
    served = plan_model(read_checkpoint(out), TARGET)
    assert [layer.weight_bytes for layer in served.layers] == [
        layer.weight_bytes for layer in plan_model(read_checkpoint(model), CONSENTING).layers
    ]


def test_conversion_refuses_all_layers_at_once(tmp_path: Path) -> None:
    inputs(tmp_path / "model", num_bits=8, dynamic=True)
    with pytest.raises(PreflightError) as error:
        convert(tmp_path / "model", tmp_path / "out")
    assert len(error.value.problems) == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output_activations", {"num_bits": 8}, r"quantized outputs \(group_0.output_activations"),
        ("input_activations", "int8", "input_activations 'int8' in group_0; .* a JSON object"),
    ],
)
def test_other_activations_are_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    write_checkpoint(tmp_path, "ct-int8-sym")
    config = read_checkpoint(tmp_path).quant_config
    config["config_groups"]["group_0"][key] = value
    write_checkpoint(tmp_path, "ct-int8-sym", config=config)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        plan_model(read_checkpoint(tmp_path), CONSENTING)
