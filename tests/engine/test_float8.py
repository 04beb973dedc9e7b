"""8-bit floats in the engine: a real model by each tool, against its own numbers in fp32."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import FLOAT_BUILDS, Truth, write_json
from engines import generate, mean_error
from hf_reference import reference_logprobs
from tiny_models import UNQUANTIZED, asset, reference

pytestmark = pytest.mark.engine

GROUP_SIZE = 96
# At two ranks q, k, v, gate and up are cut inside a block's rows, and down inside its columns.
CASES = [("ct-float-channel", 1), ("fp8-block", 2), ("fbgemm-fp8", 1), ("modelopt-fp8", 1)]


def write_quantized(build: str, path: Path) -> dict[str, Truth]:
    """The committed model in bfloat16 with every linear of its blocks quantized."""
    shutil.copytree(asset(UNQUANTIZED), path)
    made, truths = FLOAT_BUILDS[build], {}
    tensors = load_file(path / "model.safetensors")
    for module in [name.removesuffix(".weight") for name in tensors if "_proj" in name]:
        truths[module] = made.quantized(tensors.pop(f"{module}.weight"), GROUP_SIZE)
        for name, tensor in made.tensors(truths[module]).items():
            tensors[f"{module}.{name}"] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", config | {"quantization_config": made.config(GROUP_SIZE)})
    return truths


@pytest.mark.parametrize(("build", "tp_size"), CASES)
def test_answers_as_its_own_numbers_unquantized(build: str, tp_size: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    truths = write_quantized(build, model)
    prompts = [prompt["token_ids"] for prompt in reference(UNQUANTIZED)["prompts"][:4]]
    answers = generate(
        tmp_path,
        model,
        prompts,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tp_size == 2 else None,
        quantization="fusedq",
        additional_config={"fusedq": {"activations": "16-bit"}},
        tensor_parallel_size=tp_size,
        enforce_eager=True,
        dtype="bfloat16",
    )
    for answer, expected in zip(answers, reference_logprobs(model, truths, prompts), strict=True):
        assert mean_error(answer["prompt_logprobs"], expected) <= 0.03
