"""Packs small random layers as bitsandbytes does, and dequantizes them with its own code."""

from __future__ import annotations

import argparse
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

K = 192
# Name -> out_features and the arguments of quantize_4bit. 88 rows make more than one nested block;
# blocks of 128 and 256 begin inside of rows.
CASES = {
    "nf4-nested": (88, {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}),
    "nf4-nested-256": (8, {"quant_type": "nf4", "blocksize": 256, "compress_statistics": True}),
    "fp4-nested-128": (8, {"quant_type": "fp4", "blocksize": 128, "compress_statistics": True}),
    "nf4-bf16": (8, {"quant_type": "nf4", "blocksize": 64, "quant_storage": torch.bfloat16}),
    "fp4": (8, {"quant_type": "fp4", "blocksize": 64}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (n, arguments) in CASES.items():
        weight = torch.randn(n, K, generator=generator) / 16
        packed, state = quantize_4bit(weight, **arguments)
        tensors[f"{name}.weight"] = packed
        for suffix, tensor in state.as_dict(packed=True).items():
            tensors[f"{name}.weight.{suffix}"] = tensor
        # One long row: the CPU kernel takes wrong blocks where one begins inside of a row
        state.shape = torch.Size([1, n * K])
        tensors[f"{name}.values"] = dequantize_4bit(packed, state).view(n, K)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, args.out, metadata={"tool": f"bitsandbytes {bitsandbytes.__version__}"})


if __name__ == "__main__":
    main()
