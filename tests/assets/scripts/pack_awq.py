"""Packs one small linear layer with each of AutoAWQ's modules: its gemm, gemv and gemv_fast."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from safetensors.torch import save_file

N, K, GROUP_SIZE = 32, 192, 64
MODULES = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator)
    zeros = torch.randint(0, 16, (N, K // GROUP_SIZE), generator=generator)
    scales = torch.rand((N, K // GROUP_SIZE), generator=generator).mul(0.01).add(0.01).half()
    linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float32)
    # The modules recover the codes from the weight: fp32 keeps them apart by far
    grouped = [t.float().repeat_interleave(GROUP_SIZE, 1) for t in (zeros, scales)]
    linear.weight.data = (codes - grouped[0]) * grouped[1]
    tensors = {"codes": codes.byte(), "zeros": zeros.byte(), "scales": scales}
    for version, module in MODULES.items():
        # gemm wants groups first
        order = (scales.T, zeros.T) if version == "gemm" else (scales, zeros)
        packed = module.from_linear(
            linear, 4, GROUP_SIZE, scales=order[0].contiguous(), zeros=order[1].contiguous()
        )
        for name in ("qweight", "qzeros", "scales"):
            tensors[f"{version}.{name}"] = getattr(packed, name).contiguous()
    save_file(tensors, args.out, metadata={"tool": "autoawq 0.2.9"})


if __name__ == "__main__":
    main()
