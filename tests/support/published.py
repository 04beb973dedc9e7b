"""Checkpoints of published models without their weights: config, index, headers of sparse files.

Sizes are those of the models' published config.json files.
"""

import json
from dataclasses import asdict, dataclass
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
class Model(ModelShape):
    """A decoder's published sizes; `tied` embeddings have no lm_head."""

    max_positions: int = 32768
    tied: bool = False


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


def config_of(model: Model, fmt: str, group_size: int = 128) -> dict[str, Any]:
    return config(model, FORMATS[fmt][1](group_size)) | {
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tied,
    }


def tensors_of(model: Model, fmt: str, group_size: int = 128) -> Stored:
    """Every tensor of the checkpoint: name -> (dtype, shape)."""
    stored: Stored = {"model.embed_tokens.weight": ("BF16", (model.vocab, model.hidden))}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        for name, (n, k) in model.unfused_linears().items():
            for suffix, tensor in FORMATS[fmt][0](n, k, group_size).items():
                stored[f"{prefix}.{name}.{suffix}"] = tensor
            if model.qkv_bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                stored[f"{prefix}.{name}.bias"] = ("BF16", (n,))
        norms = {"input_layernorm": model.hidden, "post_attention_layernorm": model.hidden}
        if model.model_type == "qwen3":
            norms |= {"self_attn.q_norm": model.head_dim, "self_attn.k_norm": model.head_dim}
        stored |= {f"{prefix}.{name}.weight": ("BF16", (size,)) for name, size in norms.items()}
    stored["model.norm.weight"] = ("BF16", (model.hidden,))
    if fmt in QUANTIZED_HEADS:
        packed = FORMATS[fmt][0](model.vocab, model.hidden, group_size)
        stored |= {f"lm_head.{suffix}": tensor for suffix, tensor in packed.items()}
    elif not model.tied:
        stored["lm_head.weight"] = ("BF16", (model.vocab, model.hidden))
    return stored


def write_headers(
    path: Path, model: Model, fmt: str = "gptq", group_size: int = 128, shards: int = 1
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
