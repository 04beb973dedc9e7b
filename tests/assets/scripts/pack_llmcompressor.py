"""Quantizes a small random model with llm-compressor, each layer by another scheme.

Writes its stored tensors and, as metadata, its quantization config and the SHA-256 of each weight,
fp32 `[N, K]`, by compressed-tensors' own decompression.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import is_match
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from make_reference import digest
from quantize_llmcompressor import group
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

INT, NAIVE = {"format": "int-quantized"}, {"format": "naive-quantized"}
ASYMMETRIC = {"symmetric": False}
# What the committed checkpoints lack; a scheme per linear layer of three decoder blocks
SCHEMES = {
    "0.self_attn.q_proj": (2, 32, {}),
    "0.self_attn.k_proj": (2, 32, ASYMMETRIC),
    "0.self_attn.v_proj": (3, 32, ASYMMETRIC),
    "0.self_attn.o_proj": (4, None, ASYMMETRIC),
    "0.mlp.gate_proj": (5, 32, ASYMMETRIC),
    "0.mlp.up_proj": (6, 32, {}),
    "0.mlp.down_proj": (6, 32, ASYMMETRIC),
    "1.self_attn.q_proj": (7, 32, {}),
    "1.self_attn.k_proj": (7, 32, ASYMMETRIC),
    "1.self_attn.v_proj": (8, 32, {}),
    "1.self_attn.o_proj": (8, None, {}),
    "1.mlp.gate_proj": (8, 32, ASYMMETRIC | INT),
    "1.mlp.up_proj": (4, 32, INT),
    "1.mlp.down_proj": (8, None, NAIVE),
    "2.self_attn.q_proj": (4, 32, {"actorder": "static"}),
    "2.self_attn.k_proj": (4, 32, ASYMMETRIC | {"actorder": "weight"}),
    "2.self_attn.v_proj": (2, None, {}),
    "2.self_attn.o_proj": (3, None, ASYMMETRIC),
    "2.mlp.gate_proj": (5, None, {}),
    "2.mlp.up_proj": (6, 32, INT),
    "2.mlp.down_proj": (7, None, ASYMMETRIC | INT),
}


def quantize(folder: Path) -> None:
    plain = folder / "plain"
    common.save_random_llama(plain, layers=3)
    model = LlamaForCausalLM.from_pretrained(plain, dtype="auto")
    rows = torch.randint(2, 512, (32, 64))
    samples = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    groups = {
        f"group_{index}": group(rf"re:.*layers\.{re.escape(module)}$", bits, size, **options)
        for index, (module, (bits, size, options)) in enumerate(SCHEMES.items())
    }
    oneshot(
        model=model,
        # Asked for wherever there is a dataset, though this one is of tokens
        tokenizer=AutoTokenizer.from_pretrained(plain),
        dataset=Dataset.from_dict(samples),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups=groups),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(folder / "quantized", save_compressed=True)


def values(parts: dict[str, torch.Tensor], module: str, settings: dict) -> torch.Tensor:
    schemes = map(QuantizationScheme.model_validate, settings["config_groups"].values())
    scheme = next(s for s in schemes if is_match(module, torch.nn.Linear(1, 1), s.targets))
    # With fp32 scales the library computes in fp32
    state = dict(parts, weight_scale=parts["weight_scale"].float())
    if "weight_shape" in parts:
        state["weight_shape"] = torch.Size(parts["weight_shape"].tolist())
    compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
    return compressor.decompress(state, scheme)["weight"]


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
    settings, tensors, digests = config["quantization_config"], {}, {}
    for name in SCHEMES:
        module = f"model.layers.{name}"
        found = {key: value for key, value in stored.items() if key.startswith(f"{module}.")}
        parts = {key.removeprefix(f"{module}."): value for key, value in found.items()}
        tensors |= found
        digests[module] = digest(values(parts, module, settings))
    metadata = {
        "tool": f"llmcompressor {version('llmcompressor')}",
        "quantization_config": json.dumps(settings),
        "values_sha256": json.dumps(digests),
    }
    save_file(tensors, args.out, metadata=metadata)


if __name__ == "__main__":
    main()
