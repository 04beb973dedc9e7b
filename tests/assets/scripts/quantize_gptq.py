"""Quantizes a model with GPTQModel into the GPTQ (v1) format."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import common
import torch
from transformers import AutoTokenizer

# Read at import: on two cores the default is one worker, fewer than the loader asks for.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")

from gptqmodel import GPTQModel, QuantizeConfig

VARIANTS = {
    "g128": {"bits": 4, "group_size": 128, "sym": True},
    # One decoder block of each kind, so that a small file has every width that GPTQ packs
    "mixed": {
        "bits": 8,
        "group_size": 128,
        "sym": True,
        "dynamic": {
            r"+:.*\.layers\.0\.mlp\..*": {
                "bits": 4,
                "group_size": 32,
                "sym": False,
                "desc_act": True,
            },
            r"+:.*\.layers\.1\.self_attn\..*": {"bits": 3, "group_size": 32},
            r"+:.*\.layers\.1\.mlp\..*": {"bits": 2, "group_size": 32, "sym": False},
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = QuantizeConfig(**{"desc_act": False, "device": "cpu", **VARIANTS[args.variant]})
    model = GPTQModel.load(str(args.model), config, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = common.calibration_windows(tokenizer)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(samples, batch_size=8)
    model.save(str(args.out))
    common.finish_directory(args.model, args.out)


if __name__ == "__main__":
    main()
