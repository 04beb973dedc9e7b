"""Packs small random layers with compressed-tensors 0.12, which wrote what it no longer does.

`actorder: group` with its weight_g_idx, and whole codes per word in widths that divide none. Writes
what `pack_llmcompressor.py` does. Needs requirements-llmcompressor.txt with another version:

    pip install --no-deps compressed-tensors==0.12.2
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from make_reference import digest
from safetensors.torch import save_file

N, K, GROUP_SIZE = 32, 96, 32
# Bits and actorder; the version dequantizes no stored zero points
SCHEMES = [(3, None), (5, None), (6, None), (7, None), (3, "group"), (4, "group"), (8, "group")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    tensors, groups, digests = {}, {}, {}
    for index, (bits, actorder) in enumerate(SCHEMES):
        module = f"model.layers.{index}.mlp.up_proj"
        weights = QuantizationArgs(
            num_bits=bits, strategy="group", group_size=GROUP_SIZE, actorder=actorder
        )
        g_idx = torch.arange(K) // GROUP_SIZE
        if actorder:
            g_idx = g_idx[torch.randperm(K, generator=generator)]
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (N, K), generator=generator)
        # Powers of two, by which the tool's own rounding gives the codes back
        scales = 2.0 ** torch.randint(-9, -5, (N, K // GROUP_SIZE), generator=generator)
        order = g_idx.int() if actorder else None
        parts = compressor.compress_weight(codes * scales[:, g_idx], scales, weights, g_idx=order)
        parts["weight_scale"] = scales
        if actorder:
            parts["weight_g_idx"] = order
        digests[module] = digest(compressor.decompress_weight(parts, weights))
        parts["weight_scale"] = scales.bfloat16()
        tensors |= {f"{module}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        scheme = QuantizationScheme(targets=[f"re:{module}$"], weights=weights)
        groups[f"group_{index}"] = scheme.model_dump(mode="json")
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": version("compressed-tensors"),
        "config_groups": groups,
    }
    metadata = {
        "tool": f"compressed-tensors {version('compressed-tensors')}",
        "quantization_config": json.dumps(settings),
        "values_sha256": json.dumps(digests),
    }
    save_file(tensors, args.out, metadata=metadata)


if __name__ == "__main__":
    main()
