"""Packs small linear layers in AWQ's gemm as GPTQModel does at every width but 4 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file

# 24 codes end inside a word at every width but 8 bits
N, K, GROUP_SIZE = 24, 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for bits in (2, 3, 5, 6, 7, 8):
        codes = torch.randint(0, 2**bits, (N, K), generator=generator)
        zeros = torch.randint(0, 2**bits, (N, K // GROUP_SIZE), generator=generator)
        # Two bits, so that the fp16 products are exact
        scales = torch.randint(2, 4, (N, K // GROUP_SIZE), generator=generator).mul(2**-8).half()
        linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float32)
        grouped = [t.float().repeat_interleave(GROUP_SIZE, 1) for t in (zeros, scales)]
        linear.weight.data = (codes - grouped[0]) * grouped[1]
        module = AwqTorchLinear(bits, GROUP_SIZE, False, False, K, N)
        module.pack(linear, scales, zeros)
        stored = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
        values = dequantize_gemm(**stored, bits=bits, group_size=GROUP_SIZE).T
        stored |= {"codes": codes.byte(), "zeros": zeros.byte(), "values": values}
        tensors |= {f"{bits}.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, args.out, metadata={"tool": "gptqmodel 7.7.0"})


if __name__ == "__main__":
    main()
