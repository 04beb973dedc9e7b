"""Load time before and after `fusedq convert`: from safetensors files to resident weights.

    python benchmarks/bench_convert.py --csv benchmarks/results/cpu/convert.csv

A random GPTQ checkpoint is planned and loaded layer by layer as the engine does it, without vLLM,
from a warm page cache: for the layout of the Triton kernels (in CPU memory) and for vLLM's CPU
operator. Both checkpoints are loaded in turn within one run.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from fusedq_kernels.choose.device import cpu_device, device_by_name
from gemmbench.shapes import ModelShape
from random_checkpoint import write_random_checkpoint
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.load.convert import convert
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model

SHAPE = ModelShape(hidden=2048, intermediate=8192, layers=8, heads=16, kv_heads=8, vocab=512)
DEVICES = {"gpu-layout": device_by_name("h200"), "cpu": cpu_device()}
COLUMNS = ("layout", "checkpoint", "median_s", "min_s", "max_s", "packed_mb", "threads", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {"gptq": Path(folder) / "gptq", "converted": Path(folder) / "converted"}
        write_random_checkpoint(paths["gptq"], SHAPE)
        convert(paths["gptq"], paths["converted"])
        for layout, device in DEVICES.items():
            seconds: dict[str, list[float]] = {name: [] for name in paths}
            for _ in range(arguments.repeats + 1):
                for name, path in paths.items():
                    elapsed, packed = load(path, Target(device, torch.bfloat16))
                    seconds[name].append(elapsed)
            for name, found in seconds.items():
                warm = found[1:]
                times = [round(f(warm), 3) for f in (statistics.median, min, max)]
                row = (layout, name, *times, round(packed / 1e6, 1), arguments.threads)
                rows.append((*row, torch.__version__))
                print(row)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


def load(path: Path, target: Target) -> tuple[float, int]:
    """Seconds to read, slice and make resident every layer, and their resident bytes."""
    start, packed = time.perf_counter(), 0
    checkpoint = read_checkpoint(path)
    files = {info.file for info in checkpoint.tensors.values()}
    opened = {name: safe_open(path / name, "pt") for name in files}
    for plan in plan_model(checkpoint, target).layers:
        loader = LayerLoader.create(plan, target.act_dtype, torch.device("cpu"))
        for part, fmt in zip(plan.shard.parts, plan.formats, strict=True):
            for stored in fmt.tensors:
                name = f"{part.module}.{stored.name}"
                tensor = opened[checkpoint.tensors[name].file].get_tensor(name)
                loader.add(stored.name, tensor, part.shard_id)
        loader.check_complete()
        packed += plan.weight_bytes + plan.metadata_bytes
    return time.perf_counter() - start, packed


if __name__ == "__main__":
    main()
