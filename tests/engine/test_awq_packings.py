"""AWQ's other packings and 8 bits in the engine: the committed AWQ model, packed again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from checkpoints import ALL_BUILDS, AWQ_BUILDS, Truth, write_json
from engines import generate, mean_error
from tiny_models import asset, reference
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.formats import format_for

pytestmark = pytest.mark.engine

NAME = "tiny-llama-awq-g128"


def write_repacked(build: str, path: Path) -> None:
    shutil.copytree(asset(NAME), path)
    fmt = format_for(read_checkpoint(path))
    tensors = load_file(path / "model.safetensors")
    for module in fmt.modules():
        layer = fmt.layer_of(module)
        stored = {t.name: tensors.pop(f"{module}.{t.name}") for t in layer.tensors}
        weight = layer.packing.logical(stored, layer, layer.whole)
        # In more bits the same values, by steps that are as much smaller
        bits = ALL_BUILDS[build].bits
        finer = 2 ** (bits - 4)
        codes, zeros = (t.numpy() * np.uint8(finer) for t in (weight.codes, weight.zeros))
        truth = Truth(codes, zeros, weight.scales / finer, 128, bits=bits)
        for name, tensor in ALL_BUILDS[build].tensors(truth).items():
            tensors[f"{module}.{name}"] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= ALL_BUILDS[build].config(128)
    write_json(path / "config.json", config)


@pytest.mark.parametrize("build", [*AWQ_BUILDS, "awq-8bit"])
def test_answers_as_the_gemm_packing(tmp_path: Path, build: str) -> None:
    model = tmp_path / "model"
    write_repacked(build, model)
    prompts = reference(NAME)["prompts"][:4]
    answers = generate(
        tmp_path,
        model,
        [prompt["token_ids"] for prompt in prompts],
        quantization="fusedq",
        enforce_eager=True,
    )
    for answer, prompt in zip(answers, prompts, strict=True):
        assert mean_error(answer["prompt_logprobs"], prompt["prompt_logprobs"]) <= 0.03
