"""Loading speed on the CPU: MB of packed weight per second, from stored tensors to resident form.

    python benchmarks/bench_load.py --csv benchmarks/results/cpu/load.csv

Covers slicing, decoding and packing of one linear layer as the engine does it, for each format at
each width and for the packed layouts of both devices. Reading the file is not part of it. MB are of
the resident weight.
"""

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

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
DEVICES = {"cpu": cpu_device(), "gpu-layout": device_by_name("h200")}
PLACES = ("cpu", "cuda")
DRY_N, DRY_K = 64, 256

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    n: Annotated[int, typer.Option(help="out_features")] = 14336,
    k: Annotated[int, typer.Option(help="in_features")] = 4096,
    group_size: Annotated[int, typer.Option()] = 128,
    threads: Annotated[int, typer.Option()] = 2,
    repeats: Annotated[int, typer.Option()] = 7,
    clock: Annotated[str, typer.Option(help="wall, or cpu: seconds of all threads")] = "wall",
    on: Annotated[str, typer.Option(help="cpu or cuda: where it is decoded and packed")] = "cpu",
    only: Annotated[str, typer.Option(help="formats whose name contains this")] = "",
    file: Annotated[Path | None, typer.Option("--csv", help="write the rows to this file")] = None,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU; times mean nothing")] = False,
) -> None:
    for name, given, known in (("clock", clock, tuple(CLOCKS)), ("device", on, PLACES)):
        if given not in known:
            raise typer.BadParameter(f"unknown {name} {given!r}; known: {', '.join(known)}")
    if dry_run:
        n, k, on, repeats = DRY_N, DRY_K, "cpu", 1
    if on == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; --on cpu packs on the CPU")
    torch.set_num_threads(threads)
    rows = []
    for made in random_layers(n, k, group_size):
        if only not in made.name:
            continue
        layer = describe(made)
        for device in DEVICES if on == "cpu" else ("gpu-layout",):
            seconds, packed = measure(
                layer, made.tensors, device, repeats, CLOCKS[clock], torch.device(on)
            )
            median = statistics.median(seconds)
            speed, weight = packed / 1e6 / median, median * 1e9 / (layer.n * layer.k)
            row = (made.name, device, round(speed), round(packed / 1e6, 1), round(weight, 2))
            rows.append((*row, clock, threads, torch.__version__))
            print(f"{made.name:34} {device:11} {speed:7.0f} MB/s {weight:6.2f} ns/weight")
    if file is not None:
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([COLUMNS, *rows])


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
    app()
