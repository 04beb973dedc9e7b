"""Loading speed on the CPU: MB of packed weight per second, from stored tensors to resident form.

    python benchmarks/bench_load.py --csv benchmarks/results/cpu/load.csv

Covers slicing, decoding and packing of one linear layer as the engine does it, for each format at
each width and for the packed layouts of both devices. Reading the file is not part of it. MB are of
the resident weight.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fusedq_kernels.choose.device import cpu_device, device_by_name
from random_layers import RandomLayer, Tensors, random_layers
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.formats import LayerFormat, Region, format_for
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import Target, plan_layer
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard

MODULE = "model.layers.0.mlp.up_proj"
STORED = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}
COLUMNS = (
    "format",
    "device",
    "mb_per_s",
    "packed_mb",
    "ns_per_weight",
    "clock",
    "threads",
    "torch",
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEVICES = {"cpu": cpu_device(fused_op=True), "gpu-layout": device_by_name("h200")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=14336, help="out_features")
    parser.add_argument("--k", type=int, default=4096, help="in_features")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds of all threads, where others use the machine too",
    )
    parser.add_argument(
        "--on", choices=("cpu", "cuda"), default="cpu", help="where layers are decoded and packed"
    )
    parser.add_argument("--only", default="", help="formats whose name contains this")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for made in random_layers(arguments.n, arguments.k, arguments.group_size):
        if arguments.only not in made.name:
            continue
        layer = describe(made)
        for device in DEVICES if arguments.on == "cpu" else ("gpu-layout",):
            clock = CLOCKS[arguments.clock]
            seconds, packed = measure(
                layer, made.tensors, device, arguments.repeats, clock, torch.device(arguments.on)
            )
            median = statistics.median(seconds)
            speed, weight = packed / 1e6 / median, median * 1e9 / (layer.n * layer.k)
            row = (made.name, device, round(speed), round(packed / 1e6, 1), round(weight, 2))
            rows.append((*row, arguments.clock, arguments.threads, torch.__version__))
            print(f"{made.name:34} {device:11} {speed:7.0f} MB/s {weight:6.2f} ns/weight")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


def describe(made: RandomLayer) -> LayerFormat:
    """The layer as its own format reads its headers."""
    infos = {
        f"{MODULE}.{name}": TensorInfo(name, STORED[tensor.dtype], tuple(tensor.shape), "memory")
        for name, tensor in made.tensors.items()
    }
    small = {
        f"{MODULE}.{name}": tensor.numpy().tobytes()
        for name, tensor in made.tensors.items()
        if "quant_state" in name
    }
    checkpoint = Checkpoint("memory", {}, made.config, "config.json", infos, small)
    layer = format_for(checkpoint).layer_of(MODULE)
    if layer is None:
        raise ValueError(f"{made.name}: not recognised as quantized")
    return layer


def measure(
    layer: LayerFormat,
    tensors: Tensors,
    device: str,
    repeats: int,
    clock: Callable[[], float],
    place: torch.device,
) -> tuple[list[float], int]:
    part = PartShard(MODULE, None, Region(0, layer.n, 0, layer.k))
    shard = LayerShard(MODULE, ParallelStyle.COLUMN, 1, (part,))
    plan = plan_layer(shard, {MODULE: layer}, Target(DEVICES[device], torch.float16))
    loader = LayerLoader.create(plan, torch.float16, place)
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        for name, tensor in tensors.items():
            loader.add(name, tensor)
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    loader.check_complete()
    return seconds[1:], plan.weight_bytes + plan.metadata_bytes


if __name__ == "__main__":
    main()
