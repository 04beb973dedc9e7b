"""Writes a checkpoint with random weights in the layout of a real quantizer, for speed runs.

    python benchmarks/random_checkpoint.py llama-3-8b gptq FOLDER

Every code is equally likely and outputs keep the scale of the inputs, so that the model can be run
for any number of steps; what it says means nothing. One safetensors file per decoder block, made on
the GPU where there is one.
"""

import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from fusedq_kernels.types import WeightType
from gemmbench.shapes import MODELS, ModelShape

GROUP_SIZE = 128
PACK = 8
NF4_BLOCK = 64
# The standard deviation of codes that are equally likely from 0 to 15, to 255, of NF4's values.
CODE_DEVIATION = 4.6
BYTE_DEVIATION = 73.9
NF4_DEVIATION = statistics.pstdev(WeightType.NF4.codebook)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

Tensors = dict[str, torch.Tensor]


def write_random_checkpoint(
    path: Path,
    shape: ModelShape,
    layout: str = "gptq",
    tokenizer: Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> None:
    """Write config.json and one safetensors file per block; the tokenizer is copied if given.

    `layout` is a key of `LAYOUTS`: weights in groups of 128 with fp16 scales, NF4 in blocks of 64
    with fp32 ones, bf16 for all else. Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    generator = torch.Generator(device).manual_seed(seed)
    path.mkdir(parents=True, exist_ok=True)
    index, size = {}, 0
    for number, tensors in enumerate(_blocks(shape, layout, generator)):
        name = f"model-{number:05}.safetensors"
        save_file({k: v.cpu() for k, v in tensors.items()}, path / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    written = {"metadata": {"total_size": size}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(written, indent=1))
    for file in TOKENIZER_FILES if tokenizer else ():
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, path)
    (path / "config.json").write_text(json.dumps(config(shape, LAYOUTS[layout][1]), indent=1))


def config(shape: ModelShape, quantization: dict[str, object] | None) -> dict[str, object]:
    """config.json of a model of this shape; without `quantization` that of the 16-bit model."""
    found = {
        "architectures": [ARCHITECTURES[shape.model_type]],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if shape.num_experts:
        found |= {
            "moe_intermediate_size": shape.intermediate,
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.top_k,
            "norm_topk_prob": True,
        }
    return found | ({"quantization_config": quantization} if quantization else {})


def _blocks(shape: ModelShape, layout: str, generator: torch.Generator) -> Iterator[Tensors]:
    """The tensors outside the decoder blocks, then those of each block."""
    make, options = LAYOUTS[layout][0], {"generator": generator, "device": generator.device}
    vocab = (shape.vocab, shape.hidden)
    yield {
        "model.embed_tokens.weight": torch.randn(vocab, **options).bfloat16(),
        "lm_head.weight": torch.randn(vocab, **options).div_(shape.hidden**0.5).bfloat16(),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        tensors = {
            f"{block}.{norm}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        if shape.num_experts:
            router = torch.randn((shape.num_experts, shape.hidden), **options)
            tensors[f"{block}.mlp.gate.weight"] = router.div_(shape.hidden**0.5).bfloat16()
        if shape.model_type in ("qwen3", "qwen3_moe"):
            for norm in ("q_norm", "k_norm"):
                ones = torch.ones(shape.head_dim, dtype=torch.bfloat16)
                tensors[f"{block}.self_attn.{norm}.weight"] = ones
        for name, (n, k) in shape.unfused_linears().items():
            linear = make(n, k, generator)
            if shape.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                linear["bias"] = torch.zeros(n, dtype=torch.bfloat16)
            tensors |= {f"{block}.{name}.{part}": tensor for part, tensor in linear.items()}
        yield tensors


def _gptq(n: int, k: int, generator: torch.Generator) -> Tensors:
    groups = k // GROUP_SIZE
    return {
        "qweight": _words((k // PACK, n), generator),
        "qzeros": torch.full((groups, n // PACK), 0x77777777, dtype=torch.int32),
        "scales": _scales((groups, n), k, generator),
        "g_idx": torch.arange(k, dtype=torch.int32) // GROUP_SIZE,
    }


def _awq(n: int, k: int, generator: torch.Generator) -> Tensors:
    groups = k // GROUP_SIZE
    return {
        "qweight": _words((k, n // PACK), generator),
        "qzeros": torch.full((groups, n // PACK), -0x77777778, dtype=torch.int32),
        "scales": _scales((groups, n), k, generator),
    }


def _compressed_tensors(
    n: int,
    k: int,
    generator: torch.Generator,
    bits: int = 4,
    deviation: float = CODE_DEVIATION,
) -> Tensors:
    return {
        "weight_packed": _words((n, k * bits // 32), generator),
        "weight_scale": _scales((n, k // GROUP_SIZE), k, generator, deviation),
        "weight_shape": torch.tensor([n, k]),
    }


def _nf4(n: int, k: int, generator: torch.Generator) -> Tensors:
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": [n, k]}
    absmax = _scales((n * k // NF4_BLOCK,), k, generator, NF4_DEVIATION).float()
    text = json.dumps(state).encode()
    return {
        "weight": _words((n * k // 8, 1), generator).view(torch.uint8).reshape(-1, 1),
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(WeightType.NF4.codebook),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }


def _words(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    options = {"generator": generator, "device": generator.device, "dtype": torch.int32}
    # The upper bound is exclusive and must itself be an int32.
    return torch.randint(-(2**31), 2**31 - 1, size, **options)


def _scales(
    size: tuple[int, ...], k: int, generator: torch.Generator, deviation: float = CODE_DEVIATION
) -> torch.Tensor:
    uniform = torch.rand(size, generator=generator, device=generator.device)
    return ((0.5 + uniform) / (deviation * k**0.5)).half()


def _compressed_config(bits: int) -> dict[str, object]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": GROUP_SIZE}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_COMMON = {"bits": 4, "group_size": GROUP_SIZE}
LAYOUTS: dict[str, tuple[Callable[..., Tensors], dict[str, object]]] = {
    "gptq": (
        _gptq,
        {
            **{"quant_method": "gptq", **_COMMON, "sym": True, "desc_act": False},
            "checkpoint_format": "gptq",
        },
    ),
    "awq": (_awq, {"quant_method": "awq", **_COMMON, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (_compressed_tensors, _compressed_config(4)),
    "w8a16": (
        partial(_compressed_tensors, bits=8, deviation=BYTE_DEVIATION),
        _compressed_config(8),
    ),
    "nf4": (
        _nf4,
        {
            **{"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
            **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
            **{"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]},
        },
    ),
}

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Argument(help=", ".join(MODELS))],
    layout: Annotated[str, typer.Argument(help=", ".join(LAYOUTS))],
    path: Annotated[Path, typer.Argument()],
) -> None:
    if model not in MODELS:
        raise typer.BadParameter(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        write_random_checkpoint(path, MODELS[model], layout, device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
