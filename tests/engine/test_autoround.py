"""AutoRound's configs in the engine, over the committed GPTQ and AWQ models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from builders.autoround import autoround_config
from checkpoints import write_json
from engines import generate, mean_error
from tiny_models import asset, reference

pytestmark = pytest.mark.engine

ALONE = {"block_name_to_quantize": "model.layers"}
OLDER = {"quant_method": "intel/auto-round", "packing_format": None}
CASES = {
    "auto-round": ("tiny-llama-gptq-g128", True, ALONE),
    "older": ("tiny-llama-gptq-g128", True, OLDER | {"backend": "auto_round:gptq:exllamav2"}),
    "awq": ("tiny-llama-awq-g128", False, ALONE | {"packing_format": "auto_round:auto_awq"}),
}


def write_model(path: Path, name: str, sym: bool, changes: dict[str, Any]) -> None:
    shutil.copytree(asset(name), path)
    config = json.loads((path / "config.json").read_text())
    settings = autoround_config(128, sym=sym) | changes
    config["quantization_config"] = {k: v for k, v in settings.items() if v is not None}
    write_json(path / "config.json", config)
    for own in ("quantize_config.json", "quant_config.json"):
        (path / own).unlink(missing_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_answers_as_under_the_tensors_own_config(tmp_path: Path, case: str) -> None:
    name, sym, changes = CASES[case]
    model = tmp_path / "model"
    write_model(model, name, sym, changes)
    prompts = reference(name)["prompts"][:4]
    answers = generate(
        tmp_path,
        model,
        [prompt["token_ids"] for prompt in prompts],
        quantization="fusedq",
        enforce_eager=True,
    )
    for answer, prompt in zip(answers, prompts, strict=True):
        assert mean_error(answer["prompt_logprobs"], prompt["prompt_logprobs"]) <= 0.03
