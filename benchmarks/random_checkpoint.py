"""Writes a Llama checkpoint with random 4-bit weights in the GPTQ layout, for speed runs only."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

GROUP_SIZE = 128
PACK = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama decoder; the head dimension is hidden_size / heads."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int = 512

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name below a block -> (out_features, in_features)."""
        kv = self.hidden_size // self.heads * self.kv_heads
        hidden, inter = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }


def write_random_gptq(path: Path, shape: LlamaShape, tokenizer: Path, seed: int = 0) -> None:
    """GPTQ v1, symmetric, group size 128, bf16 activations; every code equally likely."""
    generator = torch.Generator().manual_seed(seed)
    hidden = shape.hidden_size
    tensors = {
        "model.embed_tokens.weight": torch.randn(shape.vocab_size, hidden, generator=generator),
        "lm_head.weight": torch.randn(shape.vocab_size, hidden, generator=generator) / hidden**0.5,
        "model.norm.weight": torch.ones(hidden),
    }
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, (n, k) in shape.linears().items():
            tensors.update(_random_linear(f"{block}.{name}", n, k, generator))
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER_FILES:
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, path)
    (path / "config.json").write_text(json.dumps(_config(shape), indent=1))


def _random_linear(
    name: str, n: int, k: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    words = torch.randint(
        -(2**31), 2**31, (k // PACK, n), dtype=torch.int64, generator=generator
    ).to(torch.int32)
    groups = k // GROUP_SIZE
    # 4-bit codes around 8 have a standard deviation of 4.6: outputs keep the inputs' scale.
    scale = 1 / (4.6 * k**0.5)
    scales = (0.5 + torch.rand(groups, n, generator=generator)) * scale
    return {
        f"{name}.qweight": words,
        f"{name}.qzeros": torch.full((groups, n // PACK), 0x77777777, dtype=torch.int32),
        f"{name}.scales": scales.to(torch.float16),
        f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // GROUP_SIZE,
    }


def _config(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden_size // shape.heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        },
    }
