"""CPU tokens per second of a mixture of experts: int4 by fusedq against the same model in bf16.

    python benchmarks/bench_cpu_mixture.py --csv benchmarks/results/cpu/mixture.csv

A random Qwen3-MoE of 0.63 billion parameters, 64 experts of which a token asks 8, quantized in
groups of 128, and what its weights are worth in bf16, by vLLM's own experts. Each measurement is an
engine process of its own; the sides alternate, so that a machine that slows down slows both. Only
the ratios mean anything. Predicted before it was run, at 50 GB/s and 4 ms of a step beside the
weights: one sequence reads 195 MB in bf16 and 52 MB in 4 bits, 1.6 times as fast; eight of them,
which ask 42 experts, 835 and 220 MB, 2.4 times.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench_cpu_serving import CASES, print_ratios, run_side, write_rows
from gemmbench.shapes import ModelShape
from random_checkpoint import GROUP_SIZE, PACK, Tensors, config, write_random_checkpoint

SHAPE = ModelShape(
    1024,
    384,
    layers=8,
    heads=16,
    kv_heads=4,
    head_dim=64,
    vocab=512,
    model_type="qwen3_moe",
    num_experts=64,
    top_k=8,
)
TINY = ModelShape(
    256,
    128,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=512,
    model_type="qwen3_moe",
    num_experts=8,
    top_k=2,
)
SIDES = ("bf16", "fusedq")
DECODE = tuple(case for case in CASES if case[0].startswith("decode"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2, help="engine processes per side")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, one process per side")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder), TINY if arguments.dry_run else SHAPE)
        rows = [
            row | {"model": "mixture"}
            for repeat in range(1 if arguments.dry_run else arguments.repeats)
            for side in SIDES
            for row in run_side(models[side], side, repeat, DECODE)
        ]
    write_rows(arguments.csv, rows)
    print_ratios(rows, SIDES)


def write_models(folder: Path, shape: ModelShape) -> dict[str, Path]:
    """A random checkpoint in 4 bits, and another of what its weights are worth."""
    found = {side: folder / side for side in SIDES}
    write_random_checkpoint(found["fusedq"], shape, "compressed-tensors")
    found["bf16"].mkdir()
    for file in found["fusedq"].glob("*.safetensors"):
        save_file(
            dequantized(load_file(file)), found["bf16"] / file.name, metadata={"format": "pt"}
        )
    (found["bf16"] / "config.json").write_text(json.dumps(config(shape, None)))
    return found


def dequantized(tensors: Tensors) -> Tensors:
    """Symmetric 4-bit weights of compressed-tensors as bf16 ones, all else as it is."""
    shifts, found = torch.arange(0, 32, 32 // PACK, dtype=torch.int32), {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            codes = (tensor[..., None] >> shifts & 15).flatten(1) - 8
            scales = tensors[f"{module}.weight_scale"].float().repeat_interleave(GROUP_SIZE, 1)
            found[f"{module}.weight"] = (codes * scales).bfloat16()
        elif suffix not in ("weight_scale", "weight_shape"):
            found[name] = tensor
    return found


if __name__ == "__main__":
    main()
