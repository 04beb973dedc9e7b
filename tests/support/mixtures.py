"""Tiny mixtures of experts from known codes, scales and zeros, stored expert by expert."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints import ALL_BUILDS, Edit, Tensors, Truth, write_json

HIDDEN, INNER, COUNT, GROUP = 64, 96, 4, 32
NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """What the modules of a checkpoint are worth, by name."""

    truths: dict[str, Truth]
    stack: str = "model.layers.0.mlp.experts"

    def expert(self, number: int) -> list[Truth]:
        """Gate, up and down."""
        return [self.truths[f"{self.stack}.{number}.{name}"] for name in NAMES]


def write_mixture(
    path: Path,
    build: str = "awq",
    *,
    layers: int = 1,
    count: int = COUNT,
    hidden: int = HIDDEN,
    inner: int = INNER,
    group_size: int = GROUP,
    config: dict[str, object] | None = None,
    edits: Iterable[Edit] = (),
) -> Mixture:
    """Write a Qwen3-MoE-like checkpoint of experts, an attention layer and unquantized routers.

    `config` overrides entries of the quantization config, `edits` change the tensors, by their full
    names, before they are written.
    """
    made = ALL_BUILDS[build]
    tensors: Tensors = {}
    truths: dict[str, Truth] = {}

    def add(module: str, n: int, k: int) -> None:
        truths[module] = made.truth(n, k, group_size, seed=len(truths))
        for suffix, tensor in made.tensors(truths[module]).items():
            tensors[f"{module}.{suffix}"] = tensor

    for layer in range(layers):
        block = f"model.layers.{layer}"
        add(f"{block}.self_attn.o_proj", hidden, hidden)
        tensors[f"{block}.mlp.gate.weight"] = torch.zeros(count, hidden, dtype=torch.float16)
        for number in range(count):
            for name in NAMES:
                size = (hidden, inner) if name == "down_proj" else (inner, hidden)
                add(f"{block}.mlp.experts.{number}.{name}", *size)
    for edit in edits:
        edit(tensors)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    document = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_experts": count,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "torch_dtype": "float16",
        "quantization_config": {**made.config(group_size), **(config or {})},
    }
    write_json(path / "config.json", document)
    return Mixture(truths)
