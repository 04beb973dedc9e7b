"""Checkpoints of published models without their weights: config, index, headers of sparse files.

Sizes are those of the models' published config.json files.
"""

import json
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from builders.awq import awq_config
from builders.compressed_tensors import compressed_tensors_config
from builders.gptq import gptq_config
from gemmbench.shapes import MODELS as SHAPES
from gemmbench.shapes import ModelShape
from random_checkpoint import config

DTYPE_BYTES = {"I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "U8": 1}
Stored = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Experts:
    """Those of each layer from `first` on, which asks `top_k` of them; `config` has the model's own
    names for it. What `unquantized` names is stored in 16 bits: {module: (n, k)}, and `ignored` is
    how the quantization config says so."""

    count: int
    inner: int
    top_k: int
    config: dict[str, Any]
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    block: str = "mlp"
    first: int = 0
    unquantized: dict[str, tuple[int, int]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model(ModelShape):
    """A decoder's published sizes; `tied` embeddings have no lm_head.

    With `experts` a block's other layers of feed-forward are left out, and its attention where it
    is `plain`: the experts' `unquantized` then has it.
    """

    max_positions: int = 32768
    tied: bool = False
    experts: Experts | None = None
    plain_attention: bool = False
    group_size: int = 128

    @property
    def fused(self) -> int:
        """How many layers of vLLM's are quantized; one of experts has two weights."""
        if self.experts is None:
            return 4 * self.layers
        attention = 0 if self.plain_attention else 2 * self.layers
        return attention + 2 * (self.layers - self.experts.first)

    def quantized(self, layer: int) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each module below a block, as checkpoints name it."""
        found, experts = self.unfused_linears(), self.experts
        if experts is None:
            return found
        if self.plain_attention:
            found = {}
        found = {name: size for name, size in found.items() if name.startswith("self_attn")}
        for number in range(experts.count if layer >= experts.first else 0):
            for name, size in zip(experts.names, _sizes(experts.inner, self.hidden), strict=True):
                found[f"{experts.block}.experts.{number}.{name}"] = size
        return found


def _sizes(inner: int, hidden: int) -> tuple[tuple[int, int], ...]:
    """Gate, up and down."""
    return (inner, hidden), (inner, hidden), (hidden, inner)


def _published(name: str, **more: Any) -> Model:
    return Model(**(asdict(SHAPES[name]) | more))


MODELS = {
    "Qwen2.5-0.5B": Model(
        *(896, 4864, 24, 14, 2, 64, 151936),
        qkv_bias=True,
        model_type="qwen2",
        tied=True,
    ),
    "Qwen2.5-7B": _published("qwen2.5-7b"),
    "Qwen2.5-32B": _published("qwen2.5-32b"),
    "Qwen2-72B": _published("qwen2.5-72b"),
    # As quantizers pad it.
    "Qwen2.5-72B": _published("qwen2.5-72b", intermediate=29696),
    "Qwen3-8B": _published("qwen3-8b", max_positions=40960),
    "Qwen3-32B": _published("qwen3-32b", max_positions=40960),
    "Mistral-7B": _published("mistral-7b", model_type="mistral"),
    "Llama-3.1-8B": _published("llama-3-8b", max_positions=131072),
    "Llama-3.3-70B": _published("llama-3-70b", max_positions=131072),
    "Llama-3.1-405B": Model(
        *(16384, 53248, 126, 128, 8, 128, 128256),
        max_positions=131072,
    ),
    "Qwen3-30B-A3B": Model(
        *(2048, 6144, 48, 32, 4, 128, 151936),
        model_type="qwen3",
        max_positions=40960,
        experts=Experts(
            *(128, 768, 8),
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
            },
            unquantized={"mlp.gate": (128, 2048)},
        ),
    ),
    "Mixtral-8x7B": Model(
        *(4096, 14336, 32, 32, 8, 128, 32000),
        experts=Experts(
            *(8, 14336, 2),
            {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            names=("w1", "w3", "w2"),
            block="block_sparse_moe",
            unquantized={"block_sparse_moe.gate": (8, 4096)},
        ),
    ),
    # Kimi K2: routed experts in groups of 32, all else in bf16
    "Kimi-K2": Model(
        *(7168, 18432, 61, 64, 64, 128, 163840),
        max_positions=131072,
        plain_attention=True,
        group_size=32,
        experts=Experts(
            *(384, 2048, 8),
            {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "kimi_k2",
                "n_routed_experts": 384,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 2048,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
            },
            first=1,
            ignored=("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"),
            unquantized={
                "self_attn.q_a_proj": (1536, 7168),
                "self_attn.q_b_proj": (64 * 192, 1536),
                "self_attn.kv_a_proj_with_mqa": (576, 7168),
                "self_attn.kv_b_proj": (64 * 256, 512),
                "self_attn.o_proj": (7168, 64 * 128),
                "mlp.gate": (384, 7168),
                "mlp.shared_experts.gate_proj": (2048, 7168),
                "mlp.shared_experts.up_proj": (2048, 7168),
                "mlp.shared_experts.down_proj": (7168, 2048),
            },
        ),
    ),
}


def _gptq(n: int, k: int, group: int) -> Stored:
    return {
        "qweight": ("I32", (k // 8, n)),
        "qzeros": ("I32", (k // group, n // 8)),
        "scales": ("F16", (k // group, n)),
        "g_idx": ("I32", (k,)),
    }


def _awq(n: int, k: int, group: int) -> Stored:
    return {
        "qweight": ("I32", (k, n // 8)),
        "qzeros": ("I32", (k // group, n // 8)),
        "scales": ("F16", (k // group, n)),
    }


def _compressed_tensors(n: int, k: int, group: int) -> Stored:
    return {
        "weight_packed": ("I32", (n, k // 8)),
        "weight_scale": ("BF16", (n, k // group)),
        "weight_shape": ("I64", (2,)),
    }


def _compressed_tensors_w8(n: int, k: int, _: int) -> Stored:
    return {
        "weight_packed": ("I32", (n, k // 4)),
        "weight_scale": ("BF16", (n, 1)),
        "weight_shape": ("I64", (2,)),
    }


def _nf4_state(n: int, k: int) -> bytes:
    """What bitsandbytes says of a weight, in a tensor of its own."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.2}
    return json.dumps(state | nested).encode()


def _nf4(n: int, k: int, _: int) -> Stored:
    blocks = n * k // 64
    return {
        "weight": ("U8", (n * k // 2, 1)),
        "weight.absmax": ("U8", (blocks,)),
        "weight.nested_absmax": ("F32", (-(-blocks // 256),)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_map": ("F32", (16,)),
        NF4_STATE: ("U8", (len(_nf4_state(n, k)),)),
    }


def _nf4_config(_: int) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
FORMATS = {
    "nf4": (_nf4, _nf4_config),
    "gptq": (_gptq, gptq_config),
    "gptq-order": (_gptq, lambda group: gptq_config(group, desc_act=True)),
    "gptq-head": (_gptq, lambda group: {**gptq_config(group), "lm_head": True}),
    "awq": (_awq, awq_config),
    "compressed-tensors": (_compressed_tensors, compressed_tensors_config),
    "compressed-tensors-w8": (
        _compressed_tensors_w8,
        lambda _: compressed_tensors_config(-1, bits=8),
    ),
}


QUANTIZED_HEADS = frozenset({"gptq-head"})


def config_of(model: Model, fmt: str, group_size: int | None = None) -> dict[str, Any]:
    quantization = FORMATS[fmt][1](group_size or model.group_size)
    if model.experts is not None and model.experts.ignored:
        quantization["ignore"] = list(model.experts.ignored)
    return (
        config(model, quantization)
        | {"max_position_embeddings": model.max_positions, "tie_word_embeddings": model.tied}
        | (model.experts.config if model.experts is not None else {})
    )


def tensors_of(model: Model, fmt: str, group_size: int | None = None) -> Stored:
    """Every tensor of the checkpoint: name -> (dtype, shape)."""
    stored: Stored = {"model.embed_tokens.weight": ("BF16", (model.vocab, model.hidden))}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        plain = model.experts.unquantized if model.experts is not None else {}
        if model.experts is not None and layer < model.experts.first:
            plain = {name: size for name, size in plain.items() if not name.startswith("mlp")}
        stored |= {f"{prefix}.{name}.weight": ("BF16", size) for name, size in plain.items()}
        for name, (n, k) in model.quantized(layer).items():
            for suffix, tensor in FORMATS[fmt][0](n, k, group_size or model.group_size).items():
                stored[f"{prefix}.{name}.{suffix}"] = tensor
            if model.qkv_bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                stored[f"{prefix}.{name}.bias"] = ("BF16", (n,))
        norms = {"input_layernorm": model.hidden, "post_attention_layernorm": model.hidden}
        if model.model_type == "qwen3":
            norms |= {"self_attn.q_norm": model.head_dim, "self_attn.k_norm": model.head_dim}
        stored |= {f"{prefix}.{name}.weight": ("BF16", (size,)) for name, size in norms.items()}
    stored["model.norm.weight"] = ("BF16", (model.hidden,))
    if fmt in QUANTIZED_HEADS:
        packed = FORMATS[fmt][0](model.vocab, model.hidden, group_size or model.group_size)
        stored |= {f"lm_head.{suffix}": tensor for suffix, tensor in packed.items()}
    elif not model.tied:
        stored["lm_head.weight"] = ("BF16", (model.vocab, model.hidden))
    return stored


def write_headers(
    path: Path, model: Model, fmt: str = "gptq", group_size: int | None = None, shards: int = 1
) -> None:
    """Write the checkpoint; its weights are holes in sparse files, which take no room."""
    path.mkdir(parents=True, exist_ok=True)
    stored = list(tensors_of(model, fmt, group_size).items())
    states = {
        f"{name}.{NF4_STATE}": _nf4_state(n, k) for name, (n, k) in model.unfused_linears().items()
    }
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = stored[shard * len(stored) // shards : (shard + 1) * len(stored) // shards]
        _write_sparse(path / name, part, states)
        weight_map |= {tensor: name for tensor, _ in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config_of(model, fmt, group_size)))


def _write_sparse(
    path: Path, part: list[tuple[str, tuple[str, tuple[int, ...]]]], states: dict[str, bytes]
) -> None:
    """Holes, but for the tensors that are metadata (`states`, by their names inside a block)."""
    header, offset = {}, 0
    for name, (dtype, shape) in part:
        size = prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
        for name, entry in header.items():
            if name.endswith(NF4_STATE):
                file.seek(8 + len(raw) + entry["data_offsets"][0])
                file.write(states[".".join(name.split(".")[3:])])
