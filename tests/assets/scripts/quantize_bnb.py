"""Quantizes a model to NF4 or FP4 with bitsandbytes through transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--type", choices=("nf4", "fp4"), required=True)
    parser.add_argument("--double-quant", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.type,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(args.out)
    common.finish_directory(args.model, args.out)


if __name__ == "__main__":
    main()
