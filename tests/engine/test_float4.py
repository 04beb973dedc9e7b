"""NVFP4 in the engine by each tool, against the same weights in fp32 in transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from builders import float4
from engines import generate, mean_error
from float4_models import INPUTS, write_model
from tiny_models import reference

pytestmark = pytest.mark.engine

CT = float4.ct_config("nvfp4-pack-quantized", "tensor_group", 16)
CT["config_groups"]["group_0"]["input_activations"] = INPUTS
CONFIGS = {
    "compressed-tensors": ("nvfp4", CT),
    "modelopt": ("nvfp4", float4.modelopt_config() | {"quant_algo": "NVFP4"}),
}


@torch.inference_mode()
def expected(
    model: Path, weights: dict[str, torch.Tensor], prompts: list[list[int]]
) -> list[list[float | None]]:
    config = LlamaConfig.from_pretrained(model)
    del config.quantization_config
    stored = load_file(model / "model.safetensors")
    state = {name: t.float() for name, t in stored.items() if t.dtype == torch.bfloat16}
    state |= {f"{module}.weight": weight.float() for module, weight in weights.items()}
    llama = LlamaForCausalLM(config).float().eval()
    assert not set(llama.load_state_dict(state, strict=False).missing_keys) - {"lm_head.weight"}
    found = []
    for ids in prompts:
        logprobs = llama(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([None, *logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]])
    return found


@pytest.mark.parametrize("case", CONFIGS)
def test_answers_as_the_exact_weights_do(tmp_path: Path, case: str) -> None:
    """Each of q, k and v has a scale of all of its own; activations stay in 16 bits by consent."""
    model = tmp_path / "model"
    weights = write_model(model, *CONFIGS[case])
    ids = [each["token_ids"] for each in reference("tiny-llama-bf16")["prompts"][:4]]
    answers = generate(
        tmp_path,
        model,
        ids,
        quantization="fusedq",
        enforce_eager=True,
        additional_config={"fusedq": {"activations": "16-bit"}},
    )
    for answer, wanted in zip(answers, expected(model, weights, ids), strict=True):
        assert mean_error(answer["prompt_logprobs"], wanted) <= 0.03
