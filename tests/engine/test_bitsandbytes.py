"""bitsandbytes in the engine: the real thing against bitsandbytes, two ranks that cut blocks."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import Truth, replace, write_checkpoint
from engines import generate, mean_error
from test_tensor_parallel import run
from tiny_models import asset, reference

pytestmark = pytest.mark.engine


def test_prompt_logprobs_match_bitsandbytes(tmp_path: Path) -> None:
    name = "tiny-llama-bnb-nf4"
    prompts = reference(name)["prompts"]
    ids = [prompt["token_ids"] for prompt in prompts]
    answers = generate(tmp_path, asset(name), ids, quantization="fusedq", enforce_eager=True)
    found = [answer["prompt_logprobs"] for answer in answers]
    expected = [prompt["prompt_logprobs"] for prompt in prompts]
    assert max(map(mean_error, found, expected)) <= 0.03
    perplexities = [
        math.exp(-sum(sum(one[1:]) for one in all_) / sum(len(one) - 1 for one in all_))
        for all_ in (found, expected)
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)


@torch.inference_mode()
def logprobs_in_fp32(
    model: Path, truths: dict[str, Truth], prompts: list[list[int]]
) -> list[list[float | None]]:
    """What transformers' Llama says with the weights that the checkpoint was built from."""
    config = LlamaConfig.from_pretrained(model)
    del config.quantization_config
    stored = load_file(model / "model.safetensors")
    state = {name: t.float() for name, t in stored.items() if t.is_floating_point()}
    for module, truth in truths.items():
        n, k = truth.codes.shape
        state[f"{module}.weight"] = truth.values(0, n, 0, k).float()
    llama = LlamaForCausalLM(config).float().eval()
    assert not llama.load_state_dict(state, strict=False).missing_keys
    found = []
    for ids in prompts:
        logprobs = llama(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([None, *logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]])
    return found


def test_two_ranks_where_the_split_cuts_blocks(tmp_path: Path) -> None:
    """intermediate 416, blocks of 64: two ranks meet in the middle of the blocks of a row."""
    model = tmp_path / "model"
    generator = torch.Generator().manual_seed(0)
    tables = [
        replace(
            f"{name}.weight", lambda t: (torch.randn(t.shape, generator=generator) / 16).to(t.dtype)
        )
        for name in ("model.embed_tokens", "lm_head")
    ]
    sizes = {"hidden": 256, "intermediate": 416, "group_size": 64}
    truths = write_checkpoint(model, "bnb-fp4-nested", edits=tables, **sizes)
    prompts = [[(7 * i + 3 * j) % 30 for i in range(24)] for j in range(3)]
    answers, weights = run(tmp_path, model, prompts, 2)
    assert weights.keys() == truths.keys()
    for module, truth in truths.items():
        per_weight = truth.scales.repeat_interleave(truth.group_size, dim=1).double()
        assert torch.equal(weights[module]["codes"], torch.from_numpy(truth.codes).double())
        assert torch.equal(weights[module]["scales"], per_weight)
    for answer, expected in zip(answers, logprobs_in_fp32(model, truths, prompts), strict=True):
        assert mean_error(answer["prompt_logprobs"], expected) <= 0.03
