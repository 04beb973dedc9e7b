"""Tiny random models of transformers whose linear layers are known codes, scales and zeros."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FalconConfig,
    FalconH1Config,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from architectures.base import HEADS
from architectures.hybrid import FALCON_H1
from checkpoints import ALL_BUILDS, Edit, Truth, write_json

GROUP = 32
SURE = 0.1
"""How much likelier a token is than the next, in nats, for rounding not to change the choice."""


@dataclass(frozen=True)
class RandomModel:
    """A quantized checkpoint on disk and the same model in transformers, in fp32.

    `truths` are what its quantized modules are worth.
    """

    path: Path
    model: torch.nn.Module
    truths: dict[str, Truth]

    @torch.no_grad()
    def sure_prompts(
        self, candidates: Sequence[list[int]], count: int
    ) -> tuple[list[list[int]], list[int]]:
        """The first `count` prompts whose next token no second one is near to, and these tokens."""
        prompts, found = [], []
        for prompt in candidates:
            scores, tokens = self.model(torch.tensor([prompt])).logits[0, -1].topk(2)
            if scores[0] - scores[1] > SURE:
                prompts.append(prompt)
                found.append(int(tokens[0]))
            if len(found) == count:
                return prompts, found
        raise AssertionError(f"only {len(found)} of {len(candidates)} prompts have a sure answer")

    @torch.no_grad()
    def logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float | None]]:
        """For each prompt the log-probability of every token but the first."""
        found = []
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)])
            scores = self.model(tokens).logits[0, :-1].log_softmax(-1)
            found.append([None, *scores.gather(1, tokens[0, 1:, None])[:, 0].tolist()])
        return found


def falcon_config(heads: int = 4, kv_heads: int = 2) -> FalconConfig:
    """One block with head groups of new decoder blocks, or of old ones with 1 or all heads."""
    return FalconConfig(
        vocab_size=64,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        new_decoder_architecture=1 < kv_heads < heads,
        multi_query=kv_heads == 1,
        bias=False,
    )


def falcon_h1_config(layers: int = 1) -> FalconH1Config:
    """Attention beside a Mamba-2 layer with one group of B and C, in each block."""
    return FalconH1Config(**HEADS | FALCON_H1 | {"num_hidden_layers": layers})


def write_random_model(
    path: Path,
    config: PreTrainedConfig,
    build: str,
    plain: Sequence[str] = (),
    edits: Iterable[Edit] = (),
) -> RandomModel:
    """Write a checkpoint of random weights; every linear layer of its blocks is quantized.

    But for those whose name holds one of `plain`. Experts, which transformers keeps in one tensor,
    are stored one by one, as quantizers store them. `edits` change what is stored.
    """
    made, dtype = ALL_BUILDS[build], torch.float16
    torch.manual_seed(0)
    sees = hasattr(config, "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    matrices = {
        name: matrix
        for name, matrix in (*_linears(model), *_experts(model))
        if not any(part in name for part in plain)
    }
    tensors: dict[str, torch.Tensor] = {}
    truths: dict[str, Truth] = {}
    for seed, (name, (_, weight)) in enumerate(matrices.items()):
        n, k = weight.shape
        truth = truths[stored_name(config, name)] = made.truth(n, k, GROUP, seed, dtype)
        weight.copy_(truth.values(0, n, 0, k))
        for suffix, tensor in made.tensors(truth).items():
            tensors[f"{stored_name(config, name)}.{suffix}"] = tensor
    left_out = {parameter for parameter, _ in matrices.values()}
    left_out |= {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            tensors[stored_name(config, name)] = tensor.to(dtype).contiguous()
    for edit in edits:
        edit(tensors)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    document: dict[str, Any] = config.to_dict() | {
        "architectures": [type(model).__name__],
        "torch_dtype": "float16",
        "quantization_config": made.config(GROUP) | excluding(build, plain),
    }
    write_json(path / "config.json", document)
    return RandomModel(path, model, truths)


def write_dequantized(path: Path, quantized: RandomModel) -> Path:
    """The same checkpoint with what its quantized modules are worth, in fp32."""
    packed = tuple(f"{module}." for module in quantized.truths)
    stored = load_file(quantized.path / "model.safetensors")
    tensors = {
        name: each
        for name, each in stored.items()
        if not name.startswith(packed) or name.endswith(".bias")
    }
    modules = dict(quantized.model.named_modules())
    for module, truth in quantized.truths.items():
        values = truth.values(0, truth.codes.shape[0], 0, truth.codes.shape[1])
        if isinstance(modules.get(module), Conv1D):
            values = values.T
        tensors[f"{module}.weight"] = values.float().contiguous()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((quantized.path / "config.json").read_text())
    del document["quantization_config"]
    write_json(path / "config.json", document)
    return path


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, tuple[str, torch.Tensor]]]:
    """Each linear layer of the blocks, with its parameter and its weight `[N, K]`, a view."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and any(map(str.isdigit, name)):
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            yield name, (f"{name}.weight", weight)


def _experts(model: torch.nn.Module) -> Iterator[tuple[str, tuple[str, torch.Tensor]]]:
    """Each matrix of each expert, as if it were a layer of its own."""
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        into, back = module.gate_up_proj.data, module.down_proj.data
        for index in range(len(into)):
            gate, up = into[index].chunk(2)
            yield f"{name}.{index}.gate_proj", (f"{name}.gate_up_proj", gate)
            yield f"{name}.{index}.up_proj", (f"{name}.gate_up_proj", up)
            yield f"{name}.{index}.down_proj", (f"{name}.down_proj", back[index])


MIXTRAL = {
    **{".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}


def stored_name(config: PreTrainedConfig, name: str) -> str:
    """What checkpoints call a module or a tensor of transformers' model."""
    for ours, theirs in MIXTRAL.items() if config.model_type == "mixtral" else ():
        name = name.replace(ours, theirs)
    return name


def excluding(build: str, parts: Sequence[str]) -> dict[str, Any]:
    """How a format's config excludes modules whose names hold one of `parts`."""
    if not parts:
        return {}
    by_format: dict[str, dict[str, Any]] = {
        "awq": {"modules_to_not_convert": list(parts)},
        "gptq": {"dynamic": {f"-:.*{part}": {} for part in parts}},
        "ct": {"ignore": ["lm_head", *(f"re:.*{part}.*" for part in parts)]},
        "bnb": {"llm_int8_skip_modules": list(parts)},
    }
    return by_format[build.partition("-")[0]]


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Parameters that fp16 holds exactly, large enough for predictions to differ.

    Norms stay about what the model begins with: 1, or 0 where it adds 1 itself.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) / 16
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_((noise + parameter if is_norm else noise).half())
