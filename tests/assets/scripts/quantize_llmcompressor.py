"""Quantizes a model with llm-compressor's GPTQ into compressed-tensors' pack-quantized format."""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def group(targets: str, bits: int, group_size: int | None = None, **options) -> QuantizationScheme:
    """Integer weights of the modules that match; per channel without a group size."""
    strategy = QuantizationStrategy.GROUP if group_size else QuantizationStrategy.CHANNEL
    file_format = options.pop("format", None)
    weights = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        strategy=strategy,
        group_size=group_size,
        **options,
    )
    return QuantizationScheme(targets=[targets], weights=weights, format=file_format)


SCHEMES = {
    "asym-g32": [group("Linear", 4, 32, symmetric=False)],
    # One part of a decoder block of each kind, so that a small file has many schemes
    "mixed": [
        group(r"re:.*\.layers\.0\.self_attn\..*", 8, format="int-quantized"),
        group(r"re:.*\.layers\.0\.mlp\..*", 8, 128, symmetric=False),
        group(r"re:.*\.layers\.1\.self_attn\..*", 3, 32),
        group(r"re:.*\.layers\.1\.mlp\..*", 5, 64),
    ],
    "tied": [group("Linear", 4, 32), group("Embedding", 4, 32)],
}
# One block, for a small file
BLOCKS = {"tied": {"num_hidden_layers": 1}}


def recipe(variant: str) -> Modifier:
    if variant == "sym-g128":
        return GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16")
    groups = {f"group_{index}": scheme for index, scheme in enumerate(SCHEMES[variant])}
    if variant == "tied":
        # Only where both are quantized to the same values, without data, does the tool tie them
        return QuantizationModifier(config_groups=groups)
    return GPTQModifier(ignore=["lm_head"], config_groups=groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=["sym-g128", *SCHEMES], required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", **BLOCKS.get(args.variant, {})
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = common.calibration_windows(tokenizer)
    dataset = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    )
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=recipe(args.variant),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(args.out, save_compressed=True)
    # The tool writes the original config again
    common.update_json(args.out / "config.json", BLOCKS.get(args.variant, {}))
    common.finish_directory(args.model, args.out)


if __name__ == "__main__":
    main()
