"""Packs one small linear layer with activation reordering as GPTQModel does, and dequantizes it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors.torch import save_file

N, K, GROUP_SIZE = 32, 192, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator)
    zeros = torch.randint(0, 16, (N, K // GROUP_SIZE), generator=generator)
    # Six bits, so that the module's fp16 products are exact
    scales = torch.randint(32, 64, (N, K // GROUP_SIZE), generator=generator).mul(2**-12).half()
    g_idx = (torch.randperm(K, generator=generator) // GROUP_SIZE).int()
    linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float32)
    linear.weight.data = (codes - zeros[:, g_idx]) * scales[:, g_idx].float()
    module = TorchLinear(4, GROUP_SIZE, False, True, K, N)
    module.pack_original(linear, scales, zeros, g_idx)
    module.post_init()
    tensors = {"values": module.dequantize_weight().T.half()}
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[name] = getattr(module, name)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, args.out, metadata={"tool": "gptqmodel 7.7.0", "format": "gptq_v2"})


if __name__ == "__main__":
    main()
