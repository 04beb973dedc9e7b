"""Log-probabilities of a generated checkpoint by transformers in fp32, from its truths."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints import Truth


def reference_logprobs(
    path: Path,
    truths: Mapping[str, Truth],
    prompts: Sequence[Sequence[int]],
    added: Mapping[str, torch.Tensor] | None = None,
) -> list[list[float | None]]:
    """For each prompt the log-probability of every token but the first.

    Args:
        path: the checkpoint; its unquantized tensors are taken from the file.
        truths: what each quantized module is worth.
        added: `[N, K]` to add to the weights of modules.
    """
    packed = tuple(f"{module}." for module in truths)
    weights = {
        name: tensor.float()
        for name, tensor in load_file(path / "model.safetensors").items()
        if not name.startswith(packed)
    }
    for module, truth in truths.items():
        n, k = truth.codes.shape
        weights[f"{module}.weight"] = truth.values(0, n, 0, k).float()
    for module, delta in (added or {}).items():
        weights[f"{module}.weight"] += delta
    config = LlamaConfig.from_pretrained(path)
    del config.quantization_config
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(weights)
    return [_logprobs(model, torch.tensor([list(prompt)])) for prompt in prompts]


@torch.no_grad()
def _logprobs(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[float | None]:
    logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
    return [None, *logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()]
