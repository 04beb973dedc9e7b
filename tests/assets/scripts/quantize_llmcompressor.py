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
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(variant: str) -> GPTQModifier:
    if variant == "sym-g128":
        return GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16")
    weights = QuantizationArgs(
        num_bits=4,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.GROUP,
        group_size=32,
        symmetric=False,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=["sym-g128", "asym-g32"], required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
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
    common.finish_directory(args.model, args.out)


if __name__ == "__main__":
    main()
