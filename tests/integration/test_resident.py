"""A vLLM layer's packed weights: names and loaders, also where it has several."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from fusedq_kernels.choose.device import cpu_device
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.settings import Settings
from vllm_fusedq.worker.state import WorkerState

MODULE = "model.layers.0.mlp.down_proj"


def test_two_weights_of_one_layer_lie_side_by_side(tmp_path: Path) -> None:
    from vllm_fusedq.integration.resident import attach, finish

    write_checkpoint(tmp_path, "awq")
    target = Target(cpu_device(), torch.bfloat16, "cpu-striped")
    plans = plan_model(read_checkpoint(tmp_path), target).layers
    plan = next(plan for plan in plans if plan.prefix == MODULE)
    state, layer = WorkerState(target, Settings()), torch.nn.Module()
    for weight in ("w13", "w2"):
        shard = replace(plan.shard, weight=weight)
        attach(layer, replace(plan, shard=shard), state, torch.bfloat16)
    assert {name for name, _ in layer.named_buffers()} <= {
        f"fusedq_{weight}_{name}"
        for weight in ("w13", "w2")
        for name in ("qweight", "scales", "zeros", "perm")
    }
    stored = {
        name.removeprefix(f"{MODULE}."): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if name.startswith(MODULE)
    }

    def load(weight: str) -> None:
        for name, tensor in stored.items():
            parameter = getattr(layer, f"{weight}_{name}")
            parameter.weight_loader(parameter, tensor)

    load("w2")
    with pytest.raises(WeightLoadError, match=rf"^{MODULE}\.w13: 3 tensors were never loaded"):
        finish(layer, state)
    load("w13")
    finish(layer, state)
    first, second = layer.fusedq_loaders
    assert torch.equal(first.packed.qweight, second.packed.qweight)
    assert layer.fusedq_w13_qweight is first.packed.qweight
    assert layer.fusedq_w2_qweight is second.packed.qweight
    assert [loader.plan.name for loader in state.loaders] == [f"{MODULE}.w13", f"{MODULE}.w2"]
