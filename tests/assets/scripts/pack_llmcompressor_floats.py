"""Quantizes a small random model with llm-compressor, each layer by another scheme of floats.

Writes its stored tensors, with the scales of keys and values, and, as metadata, its quantization
config and the SHA-256 of each weight, fp32 `[N, K]`, by compressed-tensors' own decompression;
NVFP4 without the scale of the whole tensor, by which the package divides.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import common
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.utils.match import is_match
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 16, "head_dim": 8}
GLOBAL_SCALE = "weight_global_scale"
SCHEMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "NVFP4A16"),
    "o_proj": "FP8",
    "gate_proj": "MXFP4A16",
    "up_proj": "MXFP8A16",
    "down_proj": "FP8_DYNAMIC",
}
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}


def quantize(folder: Path) -> None:
    plain = folder / "plain"
    common.save_random_llama(plain, layers=1, **SIZES)
    model = LlamaForCausalLM.from_pretrained(plain, dtype="auto")
    rows = torch.randint(2, 512, (8, 64))
    samples = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    groups = {
        f"group_{index}": preset_name_to_scheme(scheme, [f"re:.*{name}$"])
        for index, (name, scheme) in enumerate(SCHEMES.items())
    }
    oneshot(
        model=model,
        # Asked for wherever there is a dataset, though this one is of tokens
        tokenizer=AutoTokenizer.from_pretrained(plain),
        dataset=Dataset.from_dict(samples),
        recipe=QuantizationModifier(
            ignore=["lm_head"], config_groups=groups, kv_cache_scheme={**KV_CACHE, "dynamic": False}
        ),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(folder / "quantized", save_compressed=True)


def values(parts: dict[str, torch.Tensor], module: str, settings: dict) -> torch.Tensor:
    schemes = map(QuantizationScheme.model_validate, settings["config_groups"].values())
    scheme = next(s for s in schemes if is_match(module, torch.nn.Linear(1, 1), s.targets))
    state = dict(parts)
    if GLOBAL_SCALE in state:
        state[GLOBAL_SCALE] = torch.ones_like(state[GLOBAL_SCALE])
    if state["weight_scale"].dtype == torch.bfloat16:
        # With fp32 scales the library computes in fp32
        state["weight_scale"] = state["weight_scale"].float()
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
    settings = config["quantization_config"]
    modules = sorted(
        {key.rpartition(".")[0] for key in stored if key.endswith("_proj.weight_scale")}
    )
    found = {name: values(common.parts_of(stored, name), name, settings) for name in modules}
    tool = f"llmcompressor {version('llmcompressor')}"
    common.save_layers(args.out, tool, settings, stored, found)


if __name__ == "__main__":
    main()
