"""Quantizes a small random model with ModelOpt, MIXED_PRECISION of what it exports as floats.

Writes its stored tensors and, as metadata, its quantization config and the SHA-256 of each weight,
fp32 `[N, K]`, by the dequantization of ModelOpt's own tensor classes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 16, "head_dim": 8}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FP8 = {"num_bits": (4, 3), "axis": None}
FP8_ROWS = {"num_bits": (4, 3), "axis": 0}
FP8_TOKENS = {**FP8, "type": "dynamic", "block_sizes": {-1: None}}
# Weights and, where they are quantized, activations
SCHEMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), (NVFP4, None)),
    "o_proj": (FP8, FP8),
    "gate_proj": (NVFP4, NVFP4),
    "up_proj": (NVFP4, NVFP4),
    "down_proj": (FP8_ROWS, FP8_TOKENS),
}


def quantize(folder: Path) -> None:
    plain = folder / "plain"
    common.save_random_llama(plain, layers=1, **SIZES)
    model = LlamaForCausalLM.from_pretrained(plain, dtype="auto")
    rows = torch.randint(2, 512, (4, 64))
    quantizers = [{"quantizer_name": "*", "enable": False}]
    for name, both in SCHEMES.items():
        for tensor, settings in zip(("weight", "input"), both, strict=True):
            if settings is not None:
                quantizer = f"*{name}.{tensor}_quantizer"
                quantizers.append({"quantizer_name": quantizer, "cfg": settings, "enable": True})
    quantizers.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": FP8, "enable": True})
    mtq.quantize(model, {"quant_cfg": quantizers, "algorithm": "max"}, lambda m: m(rows))
    export_hf_checkpoint(model, export_dir=str(folder / "quantized"))


def values(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype == torch.uint8:
        shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
        packed = NVFP4QTensor(shape, torch.float32, weight)
        return packed.dequantize(
            scale=scale, double_scale=parts["weight_scale_2"], block_sizes={-1: 16}
        )
    return FP8QTensor(weight.shape, torch.float32, weight).dequantize(
        scale=scale.reshape(-1, 1) if scale.numel() > 1 else scale
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        quantize(Path(folder))
        saved = Path(folder) / "quantized"
        config = json.loads((saved / "config.json").read_text())
        stored = load_file(saved / "model.safetensors")
    settings = config["quantization_config"]
    found = {name: values(common.parts_of(stored, name)) for name in settings["quantized_layers"]}
    tool = f"nvidia-modelopt {version('nvidia-modelopt')}"
    common.save_layers(args.out, tool, settings, stored, found)


if __name__ == "__main__":
    main()
