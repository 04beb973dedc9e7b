"""A real model quantized to NVFP4 and MXFP4 by compressed-tensors' own compressors."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import MXFP4A16, NVFP4A16
from safetensors.torch import load_file, save_file

from builders import float4
from checkpoints import write_json
from tiny_models import asset

Tensors = dict[str, torch.Tensor]
COMPRESSORS = {
    "nvfp4": (NVFP4PackedCompressor, QuantizationScheme(targets=["Linear"], **NVFP4A16)),
    "mxfp4": (MXFP4PackedCompressor, QuantizationScheme(targets=["Linear"], **MXFP4A16)),
}
INPUTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "dynamic": "local"}


def compressed(weight: torch.Tensor, kind: str) -> Tensors:
    """What compressed-tensors stores of a weight."""
    size = 16 if kind == "nvfp4" else 32
    largest = weight.float().unflatten(1, (-1, size)).abs().amax(-1)
    if kind == "nvfp4":
        whole = (448 * 6 / largest.max()).reshape(1)
        scale = (largest * whole / 6).to(torch.float8_e4m3fn).float()
        state = {"weight": weight.float(), "weight_scale": scale, "weight_global_scale": whole}
    else:
        scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
        state = {"weight": weight.float(), "weight_scale": scale}
    compressor, scheme = COMPRESSORS[kind]
    return dict(compressor.compress(state, scheme))


def decompressed(tensors: Tensors, kind: str) -> torch.Tensor:
    """The library's own weight, bf16 `[N, K]`."""
    compressor, scheme = COMPRESSORS[kind]
    return compressor.decompress(dict(tensors), scheme)["weight"]


def exact(tensors: Tensors, kind: str) -> torch.Tensor:
    """The weight in float64, by the formula of the format."""
    packed = tensors["weight_packed"].long()
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    stored = tensors["weight_scale"]
    exponents = kind == "mxfp4"
    scales = torch.exp2(stored.double() - 127) if exponents else stored.double()
    values = float4.VALUES[codes] * scales.repeat_interleave(32 if exponents else 16, 1)
    return values if exponents else values / tensors["weight_global_scale"].double()


def write_model(path: Path, kind: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The committed bf16 Llama with every linear compressed; returns their float64 weights.

    `config` is the quantization section; one of ModelOpt gets its names and conventions.
    """
    source = asset("tiny-llama-bf16")
    shutil.copytree(source, path)
    stored, tensors, weights = load_file(source / "model.safetensors"), {}, {}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if ".layers." not in name or tensor.ndim != 2 or suffix != "weight":
            tensors[name] = tensor
            continue
        made = compressed(tensor, kind)
        weights[module] = exact(made, kind)
        if config["quant_method"] == "modelopt":
            made = {
                "weight": made["weight_packed"],
                "weight_scale": made["weight_scale"],
                "weight_scale_2": 1 / made["weight_global_scale"][0],
                "input_scale": torch.tensor(0.01),
            }
        elif config["config_groups"]["group_0"].get("input_activations"):
            made["input_global_scale"] = torch.ones(1)
        tensors |= {f"{module}.{suffix}": each.contiguous() for suffix, each in made.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**model, "quantization_config": config})
    return weights
