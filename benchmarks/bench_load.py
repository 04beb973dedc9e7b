"""Loading speed on the CPU: MB of packed weight per second, from stored tensors to resident form.

    python benchmarks/bench_load.py --csv benchmarks/results/cpu/load.csv

Covers slicing, decoding and packing of one linear layer as the engine does it, for each format and
for the packed layouts of both devices. Reading the file is not part of it.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from fusedq_kernels.device import cpu_device, device_by_name
from vllm_fusedq.checkpoint import Checkpoint
from vllm_fusedq.formats import LayerFormat, Region, format_for
from vllm_fusedq.load import LayerLoader
from vllm_fusedq.plan import Target, plan_layer
from vllm_fusedq.safetensors_header import TensorInfo
from vllm_fusedq.sharding import LayerShard, ParallelStyle, PartShard

Tensors = dict[str, torch.Tensor]
MODULE = "model.layers.0.mlp.up_proj"
STORED = {torch.int32: "I32", torch.int64: "I64", torch.float16: "F16"}
COLUMNS = ("format", "device", "mb_per_s", "packed_mb", "threads", "torch")
DEVICES = {"cpu": cpu_device(fused_op=True), "gpu-layout": device_by_name("h200")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=14336, help="out_features")
    parser.add_argument("--k", type=int, default=4096, help="in_features")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for layer, tensors in layers(arguments.n, arguments.k, arguments.group_size):
        for device in DEVICES:
            seconds, packed = measure(layer, tensors, device, arguments.repeats)
            speed = packed / 1e6 / statistics.median(seconds)
            row = (layer.format, device, round(speed), round(packed / 1e6, 1), arguments.threads)
            rows.append((*row, torch.__version__))
            print(f"{layer.format:20} {device:11} {speed:7.0f} MB/s")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


def layers(n: int, k: int, group_size: int) -> list[tuple[LayerFormat, Tensors]]:
    """One random layer of each format, described by the format itself."""
    groups = k // group_size
    words = torch.randint(-(2**31), 2**31, (n * k // 8,), dtype=torch.int64).int()
    zeros = torch.randint(-(2**31), 2**31, (n * groups // 8,), dtype=torch.int64).int()
    scales = torch.rand(n * groups).half() * 0.01 + 0.01
    awq = {
        "qweight": words.view(k, n // 8),
        "qzeros": zeros.view(groups, n // 8),
        "scales": scales.view(groups, n),
    }
    gptq = {
        "qweight": words.view(k // 8, n),
        "qzeros": torch.full((groups, n // 8), 0x77777777, dtype=torch.int32),
        "scales": scales.view(groups, n),
        "g_idx": torch.arange(k, dtype=torch.int32) // group_size,
    }
    compressed = {
        "weight_packed": words.view(n, k // 8),
        "weight_scale": scales.view(n, groups),
        "weight_shape": torch.tensor([n, k]),
    }
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**weights, "group_size": group_size}}
    common = {"bits": 4, "group_size": group_size}
    return [
        describe({"quant_method": "awq", "version": "gemm", "zero_point": True, **common}, awq),
        describe({"quant_method": "gptq", "sym": True, "desc_act": False, **common}, gptq),
        describe(
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": group},
            },
            compressed,
        ),
    ]


def describe(quant_config: dict[str, object], tensors: Tensors) -> tuple[LayerFormat, Tensors]:
    infos = {
        f"{MODULE}.{name}": TensorInfo(name, STORED[tensor.dtype], tuple(tensor.shape), "memory")
        for name, tensor in tensors.items()
    }
    checkpoint = Checkpoint("memory", {}, quant_config, "config.json", infos)
    layer = format_for(checkpoint).spec_for(MODULE)
    if layer is None:
        raise ValueError(f"{quant_config}: not recognised as quantized")
    return layer, tensors


def measure(
    layer: LayerFormat, tensors: Tensors, device: str, repeats: int
) -> tuple[list[float], int]:
    part = PartShard(MODULE, None, Region(0, layer.n, 0, layer.k))
    shard = LayerShard(MODULE, ParallelStyle.COLUMN, 1, (part,))
    plan = plan_layer(shard, {MODULE: layer}, Target(DEVICES[device], torch.float16))
    loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for name, tensor in tensors.items():
            loader.add(name, tensor)
        seconds.append(time.perf_counter() - start)
    loader.check_complete()
    return seconds[1:], plan.weight_bytes + plan.metadata_bytes


if __name__ == "__main__":
    main()
