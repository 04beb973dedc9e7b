"""A tiny MiMo: two decoder blocks, and one of multi-token prediction behind them."""

import json
from pathlib import Path

import torch

from checkpoints import ALL_BUILDS, Tensors, Truth, write_checkpoint, write_json

BLOCK = "model.mtp_layers.0"
BUILD, HIDDEN, INTERMEDIATE, GROUP = "gptq-sym", 256, 448, 64


def write_mimo(path: Path, *, quantized: bool) -> dict[str, Truth]:
    """Write the checkpoint; the truth of each quantized module of its extra block, if any is."""
    made, truths = ALL_BUILDS[BUILD], {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 16).half()

    def add_block(tensors: Tensors) -> None:
        for name in ("model.embed_tokens", "lm_head"):
            tensors[f"{name}.weight"] = random(*tensors[f"{name}.weight"].shape)
        shapes = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"mlp.{p}_proj": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        shapes["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        for name, (n, k) in shapes.items():
            module = f"{BLOCK}.{name}"
            if not quantized:
                tensors[f"{module}.weight"] = random(n, k)
                continue
            truths[module] = made.truth(n, k, GROUP, seed=100 + len(truths))
            for suffix, tensor in made.tensors(truths[module]).items():
                tensors[f"{module}.{suffix}"] = tensor
        norms = ("input", "post_attention", "token_", "hidden_", "final_")
        for norm in norms:
            name = norm + ("layernorm" if norm.endswith("_") else "_layernorm")
            tensors[f"{BLOCK}.{name}.weight"] = torch.ones(HIDDEN).half()
        tensors[f"{BLOCK}.input_proj.weight"] = random(HIDDEN, 2 * HIDDEN)
        for block in ("model.layers.0", "model.layers.1", BLOCK):
            for p in "qkv":
                tensors[f"{block}.self_attn.{p}_proj.bias"] = random(HIDDEN)

    write_checkpoint(
        path,
        BUILD,
        layers=2,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        group_size=GROUP,
        config={"dynamic": {"-:.*input_proj": {}}},
        edits=[add_block],
    )
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
    write_json(path / "config.json", config | {"num_nextn_predict_layers": 1})
    return truths
