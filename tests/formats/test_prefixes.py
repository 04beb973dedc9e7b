"""Lists that begin their names otherwise than the file: what a plain weight proves is believed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import (
    ALL_BUILDS,
    Edit,
    Tensors,
    add,
    compressed_tensors_config,
    make_plain,
    replace,
    write_checkpoint,
)
from fusedq_kernels.choose.device import cpu_device
from fusedq_kernels.dtype import DType
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats import format_for
from vllm_fusedq.plan.advice import listed_otherwise
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import ModelPlan, plan_model

CPU = Target(cpu_device(), DType.FLOAT16)
LISTS = {
    "awq": "modules_to_not_convert",
    "ct-sym": "ignore",
    "ct-asym": "ignore",
    "bnb-nf4": "llm_int8_skip_modules",
}
MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
# Of the file and of the list, as transformers, vLLM and their exports have had them
PREFIXES = [
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model.model."),
    ("model.", "thinker.model."),
    ("thinker.model.", "model."),
    ("model.", ""),
]


def below(prefix: str) -> Edit:
    """Give the language model's names another prefix."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    return edit


def plain_mlp(layer: int) -> list[Edit]:
    return [make_plain(f"model.layers.{layer}.mlp.{name}", *size) for name, size in MLP.items()]


def written(path: Path, build: str, listed: list[str], edits: Iterable[Edit]) -> Checkpoint:
    config: dict[str, Any] = {LISTS[build]: ["lm_head", *listed]}
    write_checkpoint(path, build, layers=4, config=config, edits=edits)
    return read_checkpoint(path)


def warned(checkpoint: Checkpoint, plan: ModelPlan) -> list[tuple[str, str]]:
    found = listed_otherwise(format_for(checkpoint), plan.unquantized)
    return [(each.layer, each.message) for each in found]


@pytest.mark.parametrize("whole", [True, False], ids=["parent", "module"])
@pytest.mark.parametrize(("stored", "listed"), PREFIXES)
@pytest.mark.parametrize("build", LISTS)
def test_the_file_decides_and_one_warning_says_so(
    tmp_path: Path, build: str, stored: str, listed: str, whole: bool
) -> None:
    layers = (1, 2)
    names = [f"layers.{i}.mlp" for i in layers]
    if not whole:
        names = [f"{name}.{part}" for name in names for part in MLP]
    edits = [*(edit for i in layers for edit in plain_mlp(i)), below(stored)]
    checkpoint = written(tmp_path, build, [listed + name for name in names], edits)
    plan = plan_model(checkpoint, CPU)
    plain = [f"{stored}layers.{i}.mlp.{name}" for i in layers for name in MLP]
    assert set(plain) <= set(plan.unquantized)
    assert len(plan.layers) == 4 * 4 - 2 * 2
    if format_for(checkpoint).lists(plain[0]):
        return  # the tool's own matching, by any part of a name
    ((layer, message),) = warned(checkpoint, plan)
    assert sorted(layer.split(", ")) == sorted(f"{stored}layers.1-2.mlp.{name}" for name in MLP)
    start = f"unquantized, as the file proves; {LISTS[build]} in the config lists them with another"
    assert message.startswith(f"{start} prefix: {listed}layers.1.mlp")


@pytest.mark.parametrize("build", ["awq", "ct-sym"])
def test_a_packed_module_that_is_excluded_with_another_prefix_is_refused(
    tmp_path: Path, build: str
) -> None:
    listed = ["language_model.model.layers.1.mlp.down_proj"]
    with pytest.raises(PreflightError) as error:
        plan_model(written(tmp_path, build, listed, []), CPU)
    (problem,) = error.value.problems
    assert problem.layer == "model.layers.1.mlp.down_proj"
    assert "although the config leaves this module unquantized" in problem.found
    assert problem.fix == f"correct {LISTS[build]} in the config"


@pytest.mark.parametrize(
    ("build", "listed"),
    [
        # A part of its own, and one that the file does not have at all
        ("ct-sym", "vision_tower.encoder.layers.1.mlp.down_proj"),
        ("ct-sym", "talker.model.layers.1.mlp.down_proj"),
        ("awq", "talker.model.layers.1.mlp.down_proj"),
        # What the tool matches exactly, it does not match as a part
        ("ct-sym", "model.layers.1.mlp"),
        ("ct-sym", "re:language_model.model.layers.1.*"),
    ],
)
def test_other_names_exclude_nothing(tmp_path: Path, build: str, listed: str) -> None:
    module = "model.layers.1.mlp.down_proj"
    edits = [make_plain(module, *MLP["down_proj"])]
    with pytest.raises(PreflightError) as error:
        plan_model(written(tmp_path / "plain", build, [listed], edits), CPU)
    assert f"{module}: found an unquantized weight F16" in str(error.value)
    plan = plan_model(written(tmp_path / "packed", build, [listed], []), CPU)
    assert len(plan.layers) == 4 * 4


def test_a_weight_that_is_no_plain_one_proves_nothing(tmp_path: Path) -> None:
    module = "model.layers.1.mlp.down_proj"
    edits = [make_plain(module, *MLP["down_proj"]), replace(f"{module}.weight", torch.Tensor.char)]
    checkpoint = written(tmp_path, "ct-sym", [f"language_model.{module}"], edits)
    with pytest.raises(PreflightError, match=r"an unquantized weight I8 \[64, 96\] although"):
        plan_model(checkpoint, CPU)


def test_a_vision_tower_with_another_prefix_stays_unquantized(tmp_path: Path) -> None:
    """Gemma 3: llm-compressor saw model.vision_tower, transformers saved vision_tower."""
    names = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(3)]
    projector = "multi_modal_projector.linear_1"
    edits = [add(f"{name}.weight", torch.zeros(64, 64).half()) for name in (*names, projector)]
    listed = [f"model.{name}" for name in (*names, projector)]
    checkpoint = written(tmp_path, "ct-sym", listed, edits)
    plan = plan_model(checkpoint, CPU)
    assert {*names, projector} <= set(plan.unquantized)
    ((layer, _),) = warned(checkpoint, plan)
    assert layer == f"{projector}, vision_tower.encoder.layers.0-2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("head", "listed"),
    [("lm_head", "language_model.lm_head"), ("language_model.lm_head", "lm_head")],
)
def test_an_lm_head_with_another_prefix(tmp_path: Path, head: str, listed: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{head}.weight"] = tensors.pop("lm_head.weight")

    write_checkpoint(tmp_path, "ct-sym", config={"ignore": [listed]}, edits=[edit])
    plan = plan_model(read_checkpoint(tmp_path), CPU)
    assert head in plan.unquantized


@pytest.mark.parametrize(("stored", "listed"), PREFIXES)
def test_targets_with_another_prefix(tmp_path: Path, stored: str, listed: str) -> None:
    """8 bits for one module, by its name; by its class it would be one of 4."""
    module = "layers.1.mlp.down_proj"
    groups = {
        f"group_{bits}": compressed_tensors_config(32, bits=bits)["config_groups"]["group_0"]
        for bits in (4, 8)
    }
    groups["group_8"]["targets"] = [listed + module]
    eight = ALL_BUILDS["ct-8bit-sym"]

    def edit(tensors: Tensors) -> None:
        packed = eight.tensors(eight.truth(64, 96, 32, seed=5))
        tensors.update({f"model.{module}.{name}": each for name, each in packed.items()})

    config = {"config_groups": groups}
    write_checkpoint(tmp_path, "ct-sym", layers=2, config=config, edits=[edit, below(stored)])
    plan = plan_model(read_checkpoint(tmp_path), CPU)
    widths = {layer.prefix: layer.spec.weight_type.bits for layer in plan.layers}
    assert widths.pop(stored + module) == 8
    assert set(widths.values()) == {4}
