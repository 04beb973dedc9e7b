"""Writes manifest.json from the checkpoints, their references and the pinned requirements."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import common

ASSETS = Path(__file__).resolve().parents[1]
CALIBRATION = "Calibrated on 64 windows of 256 tokens of held-in text; one thread, CPU only."
GPTQMODEL = (
    "Made by GPTQModel's front door: GPTQModel.load, quantize, save; desc_act false. The "
    "quant_log.csv it also writes (timings) was left out.",
    "Installed with --no-deps against an older torch than the package's metadata asks for.",
)
BITSANDBYTES = (
    "Made by transformers' front door: from_pretrained with a BitsAndBytesConfig, on the CPU, and "
    "save_pretrained. Needs no calibration."
)
SAME_TOKENIZER = (
    "Tokenizer files and generation_config.json are the base model's, copied over the tool's "
    "rewritten ones. In the tool's JSON files only paths were dropped and torch_dtype was renamed "
    "to dtype."
)

CHECKPOINTS: dict[str, dict] = {
    "tiny-llama-bf16": {
        "tool": "transformers",
        "requirements": "requirements-llmcompressor.txt",
        "command": "python scripts/train_tiny_llama.py --out tiny-llama-bf16 "
        "--metrics METRICS.json --threads 1",
        "format": "unquantized",
        "bits": 16,
        "group_size": None,
        "symmetric": None,
        "notes": ["Trained here from scratch on the standard library's source."],
    },
    "tiny-llama-ct-sym-g128": {
        "tool": "llmcompressor",
        "requirements": "requirements-llmcompressor.txt",
        "command": "python scripts/quantize_llmcompressor.py --model tiny-llama-bf16 "
        "--out tiny-llama-ct-sym-g128 --variant sym-g128",
        "format": "compressed-tensors pack-quantized",
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "notes": [
            "Made by llm-compressor's front door: oneshot with GPTQModifier, scheme W4A16, "
            "lm_head ignored.",
            CALIBRATION,
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-ct-asym-g32": {
        "tool": "llmcompressor",
        "requirements": "requirements-llmcompressor.txt",
        "command": "python scripts/quantize_llmcompressor.py --model tiny-llama-bf16 "
        "--out tiny-llama-ct-asym-g32 --variant asym-g32",
        "format": "compressed-tensors pack-quantized",
        "bits": 4,
        "group_size": 32,
        "symmetric": False,
        "notes": [
            "Made by llm-compressor's front door: oneshot with GPTQModifier and a config group of "
            "asymmetric int4 in groups of 32, lm_head ignored.",
            CALIBRATION,
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-awq-g128": {
        "tool": "autoawq",
        "requirements": "requirements-awq.txt",
        "command": "python scripts/quantize_awq.py --model tiny-llama-bf16 "
        "--out tiny-llama-awq-g128",
        "format": "awq gemm",
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "notes": [
            "Made by AutoAWQ's front door: AutoAWQForCausalLM.quantize (scale and clip search) and "
            "save_quantized, which packs with WQLinear_GEMM.",
            "Its quantizer was subclassed through its quantizer_cls argument to copy the weights "
            "before the scale search, which on a CPU would otherwise multiply the originals "
            "(v.cpu() does not copy there). The search and the packing are AutoAWQ's own.",
            "The search ran on fp32 weights, because fp16 is slow on CPUs; the model was cast to "
            "fp16 before saving, so every float tensor is fp16.",
            "autoawq and its pins were installed with --no-deps (triton left out: no GPU).",
            CALIBRATION,
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-gptq-g128": {
        "tool": "gptqmodel",
        "requirements": "requirements-gptq.txt",
        "command": "python scripts/quantize_gptq.py --model tiny-llama-bf16 "
        "--out tiny-llama-gptq-g128 --variant g128",
        "format": "gptq (v1)",
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "notes": [
            *GPTQMODEL,
            CALIBRATION,
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-gptq-mixed": {
        "tool": "gptqmodel",
        "requirements": "requirements-gptq.txt",
        "command": "python scripts/quantize_gptq.py --model tiny-llama-bf16 "
        "--out tiny-llama-gptq-mixed --variant mixed",
        "format": "gptq (v1)",
        "bits": [8, 4, 3, 2],
        "group_size": [128, 32, 32, 32],
        "symmetric": [True, False, True, False],
        "notes": [
            *GPTQMODEL,
            "Per-module overrides (dynamic): 8 bits in layer 0's attention, 4 with activation "
            "order (desc_act) in its MLP, 3 in layer 1's attention, 2 in its MLP.",
            CALIBRATION,
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-ct-mixed": {
        "tool": "llmcompressor",
        "requirements": "requirements-llmcompressor.txt",
        "command": "python scripts/quantize_llmcompressor.py --model tiny-llama-bf16 "
        "--out tiny-llama-ct-mixed --variant mixed",
        "format": "compressed-tensors mixed-precision",
        "bits": [8, 8, 3, 5],
        "group_size": [None, 128, 32, 64],
        "symmetric": [True, False, True, True],
        "notes": [
            "Made by llm-compressor's front door: oneshot with GPTQModifier and four groups: "
            "int-quantized per channel in layer 0's attention, the others pack-quantized in its "
            "MLP, layer 1's attention and its MLP; lm_head ignored.",
            CALIBRATION,
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-ct-tied": {
        "tool": "llmcompressor",
        "requirements": "requirements-llmcompressor.txt",
        "command": "python scripts/quantize_llmcompressor.py --model tiny-llama-bf16 "
        "--out tiny-llama-ct-tied --variant tied",
        "format": "compressed-tensors pack-quantized",
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "notes": [
            "Made by llm-compressor's front door: oneshot with QuantizationModifier and two "
            "groups, one of the class Linear, one of the class Embedding; it ties the quantized "
            "embedding and the lm_head, whose values are equal. Only the first block was kept.",
            "Needs no calibration.",
            SAME_TOKENIZER,
        ],
    },
    "tiny-llama-bnb-nf4": {
        "tool": "bitsandbytes",
        "requirements": "requirements-bnb.txt",
        "command": "python scripts/quantize_bnb.py --model tiny-llama-bf16 "
        "--out tiny-llama-bnb-nf4 --type nf4 --double-quant",
        "format": "bitsandbytes nf4, double quantization",
        "bits": 4,
        "group_size": 64,
        "symmetric": None,
        "notes": [BITSANDBYTES, SAME_TOKENIZER],
    },
}


def pinned(requirements: Path) -> dict[str, str]:
    pairs = re.findall(r"^([\w.-]+)==(\S+)$", requirements.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def describe(name: str, entry: dict, base_loss: float) -> dict:
    versions = pinned(ASSETS / "scripts" / entry["requirements"])
    reference = json.loads((ASSETS / "references" / f"{name}.json").read_text())
    loss = reference["heldout_nats_per_token"]
    libraries = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers")
    return {
        **entry,
        "tool_version": versions[entry["tool"]],
        "versions": {key: versions[key] for key in libraries if key in versions},
        "reference": f"references/{name}.json",
        "reference_sha256": common.sha256_file(ASSETS / "references" / f"{name}.json"),
        "reference_command": f"python scripts/make_reference.py --model {name} "
        f"--out references/{name}.json",
        "heldout_nats_per_token": loss,
        "heldout_perplexity": reference["heldout_perplexity"],
        "heldout_loss_over_base": round(loss - base_loss, 4),
        "files": {
            path.name: {"sha256": common.sha256_file(path), "size": path.stat().st_size}
            for path in sorted((ASSETS / name).iterdir())
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", type=Path, help="what train_tiny_llama.py --metrics wrote")
    args = parser.parse_args()

    out = ASSETS / "manifest.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    training = json.loads(args.metrics.read_text()) if args.metrics else known["training"]
    base = json.loads((ASSETS / "references" / "tiny-llama-bf16.json").read_text())
    base_loss = base["heldout_nats_per_token"]
    manifest = {
        "training": training,
        "checkpoints": {
            name: describe(name, entry, base_loss) for name, entry in CHECKPOINTS.items()
        },
    }
    out.write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
