"""Quantizes a small random model with AMD Quark, each layer by another scheme.

Writes its stored tensors and, as metadata, its quantization config and the SHA-256 of each weight,
fp32 `[N, K]`, by the dequantization of Quark's own exported modules, their scales in fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import torch
from quark.torch import ModelQuantizer, export_safetensors
from quark.torch.quantization.config.config import (
    DataTypeSpec,
    FP8E4M3PerChannelSpec,
    FP8E4M3PerTensorSpec,
    Int4PerGroupSpec,
    OCP_MXFP4Spec,
    QConfig,
    QLayerConfig,
    Uint4PerGroupSpec,
)
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 16, "head_dim": 8}
GROUPS = {"ch_axis": -1, "group_size": 16}
MXFP4 = OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False)
# Weights and, where they are quantized, activations
SCHEMES: dict[str, tuple[DataTypeSpec, DataTypeSpec | None]] = {
    "q_proj": (Int4PerGroupSpec(symmetric=True, **GROUPS), None),
    "k_proj": (Int4PerGroupSpec(symmetric=False, **GROUPS), None),
    "v_proj": (Uint4PerGroupSpec(symmetric=False, **GROUPS), None),
    "o_proj": (FP8E4M3PerTensorSpec(), FP8E4M3PerTensorSpec()),
    "gate_proj": (MXFP4, None),
    "up_proj": (MXFP4, OCP_MXFP4Spec(ch_axis=-1, is_dynamic=True)),
    "down_proj": (FP8E4M3PerChannelSpec(ch_axis=0), None),
}


def quantize(folder: Path) -> torch.nn.Module:
    plain = folder / "plain"
    common.save_random_llama(plain, layers=1, **SIZES)
    model = LlamaForCausalLM.from_pretrained(plain, dtype="auto")
    layers = {}
    for name, specs in SCHEMES.items():
        weight, inputs = (spec and spec.to_quantization_spec() for spec in specs)
        layers[f"*{name}"] = QLayerConfig(weight=weight, input_tensors=inputs)
    config = QConfig(
        global_quant_config=QLayerConfig(), layer_quant_config=layers, exclude=["lm_head"]
    )
    quantizer = ModelQuantizer(config)
    rows = torch.utils.data.DataLoader(torch.randint(2, 512, (4, 64)), batch_size=2)
    model = quantizer.freeze(quantizer.quantize_model(model, rows))
    with torch.no_grad():
        export_safetensors(model, folder / "quantized")
    return model


@torch.no_grad()
def values(module: torch.nn.Module) -> torch.Tensor:
    quantizer = module.weight_quantizer
    if quantizer.scale.is_floating_point():
        quantizer.scale.data = quantizer.scale.data.float()
    return quantizer(module.weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = quantize(Path(folder))
        saved = Path(folder) / "quantized"
        config = json.loads((saved / "config.json").read_text())
        stored = load_file(saved / "model.safetensors")
    found = {
        name: values(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in SCHEMES
    }
    tool = f"amd-quark {version('amd-quark')}"
    common.save_layers(args.out, tool, config["quantization_config"], stored, found)


if __name__ == "__main__":
    main()
