"""Stacks of all experts of a layer by their headers: what is refused, and what is not quantized."""

from pathlib import Path

import pytest
import torch

from checkpoints import Tensors, add, replace
from fusedq_kernels.choose.device import cpu_device
from mixtures import COUNT, HIDDEN, INNER, NAMES, stacked, write_mixture
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.checkpoint.stacks import told_apart
from vllm_fusedq.errors import PreflightError, Problem, UnsupportedCheckpoint
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import plan_model

STACK = "model.layers.0.mlp.experts"
TARGET = Target(cpu_device(), torch.float16, keeps_activations=True)


def plans(path: Path) -> list[LayerPlan]:
    """Of the experts."""
    layers = plan_model(read_checkpoint(path), TARGET).layers
    return [plan for plan in layers if plan.prefix == STACK]


def problems(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(PreflightError) as error:
        plans(path)
    return error.value.problems


@pytest.mark.parametrize("build", ["awq", "gptq-sym", "autoround-sym", "quark-sym"])
@pytest.mark.parametrize("after", [".", "_"])
def test_stacks_that_no_tool_of_a_format_writes(tmp_path: Path, build: str, after: str) -> None:
    write_mixture(tmp_path, build, edits=[stacked(after=after)])
    with pytest.raises(UnsupportedCheckpoint) as error:
        plans(tmp_path)
    message = str(error.value)
    assert f"all experts of a layer at once ({STACK}.down_proj" in message
    assert "supported by" in message
    assert "experts that are stored one by one (experts.0.up_proj); quantize" in message


def test_stacks_by_bitsandbytes(tmp_path: Path) -> None:
    """`replace_parameter_4bit` flattens all experts into one row of blocks."""

    def flattened(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        stored = {
            "": torch.zeros(COUNT * INNER * HIDDEN, 1, dtype=torch.uint8),
            ".absmax": torch.ones(COUNT * INNER * HIDDEN // 32),
            ".quant_map": torch.ones(16),
            ".quant_state.bitsandbytes__nf4": torch.zeros(100, dtype=torch.uint8),
        }
        tensors |= {f"{STACK}.gate_up_proj{suffix}": tensor for suffix, tensor in stored.items()}

    write_mixture(tmp_path, "bnb-nf4", edits=[flattened])
    with pytest.raises(
        UnsupportedCheckpoint, match=r"at once \(model.+gate_up_proj\S* and 3 more\)"
    ):
        plans(tmp_path)


def test_stacks_whose_tensors_are_of_other_experts(tmp_path: Path) -> None:
    lost = replace(f"{STACK}.down_proj.weight_scale", lambda scales: scales[:3].clone())
    write_mixture(tmp_path, "ct-sym", edits=[stacked(), lost])
    told = r"weight_\w+ and 5 more\), whose tensors do not fit each other"
    with pytest.raises(UnsupportedCheckpoint, match=told):
        plans(tmp_path)


@pytest.mark.parametrize("sizes", [(COUNT, 2 * INNER - 1, 8), (1 << 40, 0, 8), (0, 2, 8), ()])
def test_stacks_of_sizes_that_cannot_be(sizes: tuple[int, ...]) -> None:
    name = f"{STACK}.gate_up_proj.weight_packed"
    tensors = {name: TensorInfo(name, "I32", sizes, "model.safetensors")}
    assert told_apart(tensors) == tensors


def test_experts_in_a_stack_and_one_by_one(tmp_path: Path) -> None:
    single = add(f"{STACK}.2.up_proj.weight_scale", torch.ones(INNER, 2))
    write_mixture(tmp_path, "ct-sym", edits=[stacked(), single])
    with pytest.raises(UnsupportedCheckpoint, match="whose tensors do not fit each other"):
        plans(tmp_path)


def test_stacks_of_fewer_experts_than_the_model_has(tmp_path: Path) -> None:
    def shorter(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name][:3].clone()

    write_mixture(tmp_path, "ct-sym", edits=[stacked(), shorter])
    found = problems(tmp_path)
    assert [each.layer for each in found] == [f"{STACK}.3.{name}" for name in NAMES]
    assert found[0].found == "no such module, where 3 experts have a quantized one"


def test_stacks_in_an_order_of_their_own(tmp_path: Path) -> None:
    """Gate and up would have one order of in_features between them."""
    write_mixture(tmp_path, "ct-sym-order", edits=[stacked()])
    (found, *_) = problems(tmp_path)
    assert found.found == "actorder group of experts that are stored all at once"


def test_stacks_of_plain_numbers_are_left_to_vllm(tmp_path: Path) -> None:
    def plain(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors[f"{STACK}.gate_up_proj"] = torch.zeros(COUNT, 2 * INNER, HIDDEN)
        tensors[f"{STACK}.down_proj"] = torch.zeros(COUNT, HIDDEN, INNER)

    write_mixture(tmp_path, "ct-sym", edits=[plain])
    assert plans(tmp_path) == []
