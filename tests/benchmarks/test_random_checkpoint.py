"""Random checkpoints are what they claim to be: every quantized layer passes the pre-flight."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fusedq_kernels.choose.device import device_by_name
from gemmbench.shapes import ModelShape
from random_checkpoint import LAYOUTS, write_random_checkpoint
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model

SHAPES = {
    "llama": ModelShape(256, 512, 2, 4, 2, head_dim=64, vocab=64),
    "qwen2": ModelShape(256, 512, 1, 4, 2, 64, vocab=64, qkv_bias=True, model_type="qwen2"),
    "qwen3": ModelShape(256, 512, 1, 4, 2, 64, vocab=64, model_type="qwen3"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", SHAPES)
def test_the_preflight_runs_every_layer_fused(layout: str, model_type: str, tmp_path: Path) -> None:
    shape = SHAPES[model_type]
    write_random_checkpoint(tmp_path, shape, layout)
    target = Target(device_by_name("h200"), torch.bfloat16)
    plan = plan_model(read_checkpoint(str(tmp_path)), target, 1)
    assert len(plan.layers) == 4 * shape.layers


def test_every_tensor_is_in_the_index_and_files(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SHAPES["llama"])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    names = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    assert len(names) == 3 + 2 * (2 + 7 * 4)


def test_codes_are_all_used_and_scales_keep_the_size_of_activations(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SHAPES["llama"])
    with safe_open(tmp_path / "model-00001.safetensors", "pt") as tensors:
        words = tensors.get_tensor("model.layers.0.mlp.down_proj.qweight")
        scales = tensors.get_tensor("model.layers.0.mlp.down_proj.scales").float()
    codes = torch.stack([words >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1).float()
    assert codes.std().item() == pytest.approx(4.6, rel=0.02)
    weight = (codes - 8) * scales.repeat_interleave(128, 0)
    assert (weight.square().sum(0).mean().sqrt()).item() == pytest.approx(1, rel=0.1)


def test_an_unknown_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown layout 'exl3'; known: gptq, awq, compressed-"):
        write_random_checkpoint(tmp_path, SHAPES["llama"], "exl3")
