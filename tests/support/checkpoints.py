"""Builds tiny, complete checkpoints of every format from known codes, scales and zero points.

`builders/` has one file per format; its packers follow the published layouts bit by bit and share
nothing with the code under test.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from builders import autoround, awq, bitsandbytes, compressed_tensors, float4, float8, gptq, quark
from builders.awq import AWQ_BUILDS
from builders.compressed_tensors import compressed_tensors_config
from builders.compressed_tensors import pack_quantized_tensors as compressed_tensors_tensors
from builders.gptq import gptq_tensors
from builders.truth import Build, Tensors, Truth, random_truth, with_fields

__all__ = [
    "ALL_BUILDS",
    "AWQ_BUILDS",
    "BITSANDBYTES_BUILDS",
    "BUILDS",
    "FLOAT4_BUILDS",
    "FLOAT_BUILDS",
    "ORDERED_BUILDS",
    "QUARK_BUILDS",
    "WIDTH_BUILDS",
    "Build",
    "Edit",
    "Tensors",
    "Truth",
    "add",
    "compressed_tensors_config",
    "compressed_tensors_tensors",
    "drop",
    "gptq_tensors",
    "make_plain",
    "put",
    "random_truth",
    "rename",
    "replace",
    "with_fields",
    "write_checkpoint",
    "write_json",
]

Edit = Callable[[Tensors], object]

BUILDS = awq.BUILDS | gptq.BUILDS | compressed_tensors.BUILDS | autoround.BUILDS
"""Every format at 4 bits."""

WIDTH_BUILDS = (
    awq.WIDTH_BUILDS | gptq.WIDTH_BUILDS | compressed_tensors.WIDTH_BUILDS | autoround.WIDTH_BUILDS
)
"""Every other number of bits."""

ORDERED_BUILDS = gptq.ORDERED_BUILDS | compressed_tensors.ORDERED_BUILDS
"""Builds with activation reordering, whose rows are not resident in the order of the file."""

BITSANDBYTES_BUILDS = bitsandbytes.BUILDS
"""Codebooks; the sizes are known to a tensor only."""

FLOAT_BUILDS = float8.BUILDS | quark.FLOAT_BUILDS
"""8-bit floats, by every tool."""

FLOAT4_BUILDS = float4.BUILDS | quark.FLOAT4_BUILDS
"""E2M1, in groups of one size."""

QUARK_BUILDS = quark.BUILDS
"""Integers in groups."""

ALL_BUILDS = BUILDS | WIDTH_BUILDS | AWQ_BUILDS | BITSANDBYTES_BUILDS
ALL_BUILDS |= FLOAT_BUILDS | FLOAT4_BUILDS | ORDERED_BUILDS | QUARK_BUILDS


def write_checkpoint(
    path: Path,
    build: str = "awq",
    *,
    layers: int = 1,
    hidden: int = 64,
    intermediate: int = 96,
    group_size: int = 32,
    dtype: torch.dtype = torch.float16,
    config: dict[str, Any] | None = None,
    edits: Iterable[Edit] = (),
) -> dict[str, Truth]:
    """Write a llama-like checkpoint; returns the truth of each quantized module.

    `config` overrides entries of the quantization config, `edits` change the tensors, by their full
    names, before they are written.
    """
    made = ALL_BUILDS[build]
    vocab = 32
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.zeros(vocab, hidden, dtype=dtype),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": torch.zeros(vocab, hidden, dtype=dtype),
    }
    shapes = {
        **{f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"},
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    truths: dict[str, Truth] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        for name, (n, k) in shapes.items():
            module = f"{prefix}.{name}"
            truths[module] = made.truth(n, k, group_size, seed=len(truths), dtype=dtype)
            for suffix, tensor in made.tensors(truths[module]).items():
                tensors[f"{module}.{suffix}"] = tensor
    for edit in edits:
        edit(tensors)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_json(
        path / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": vocab,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "quantization_config": {**made.config(group_size), **(config or {})},
        },
    )
    return truths


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def drop(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Replace one tensor by what `change` makes of it."""
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def add(name: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors: tensors.update({name: tensor})


def rename(old: str, new: str) -> Edit:
    """Rename every tensor of a module."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old + ".")]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return edit


def make_plain(module: str, n: int, k: int) -> Edit:
    """Replace a quantized module's tensors by an unquantized weight."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(module + ".")]:
            del tensors[name]
        tensors[f"{module}.weight"] = torch.zeros(n, k, dtype=torch.float16)

    return edit


def put(name: str, index: tuple[int, ...], value: float) -> Edit:
    """Overwrite one element, for example a scale by NaN or an entry of g_idx."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][index] = value

    return edit
