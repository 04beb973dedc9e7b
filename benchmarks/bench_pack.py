"""Packing speed on the CPU: MB of packed weight per second, for each layout and weight type.

Run as `python benchmarks/bench_pack.py --threads 2 --csv pack.csv`.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fusedq_kernels import Layout, QuantSpec, WeightType, pack, unpack, weight_bytes
from fusedq_kernels.testing import random_logical
from fusedq_kernels.types import holds

COLUMNS = ("layout", "weight_type", "n", "k", "threads", "megabytes", "pack_mb_s", "unpack_mb_s")


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """Shortest of `repeats` runs after one warm-up: the others measure the machine's noise."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(layout: Layout, weight_type: WeightType, args: argparse.Namespace) -> dict[str, object]:
    """One row of the table."""
    spec = QuantSpec(weight_type, args.group_size, torch.float16)
    logical = random_logical(args.n, args.k, spec, args.phase)
    packed = pack(logical, layout, torch.float16)
    megabytes = sum(weight_bytes(packed).values()) / 1e6
    packing = best_seconds(lambda: pack(logical, layout, torch.float16), args.repeats)
    unpacking = best_seconds(lambda: unpack(packed), args.repeats)
    values = (
        *(layout.value, weight_type.value, args.n, args.k, args.threads),
        *(round(megabytes, 1), round(megabytes / packing), round(megabytes / unpacking)),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=14336, help="out_features")
    parser.add_argument("--k", type=int, default=4096, help="in_features")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--phase", type=int, default=0, help="first row within its group")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        measure(layout, weight_type, args)
        for layout in Layout
        for weight_type in WeightType
        if holds(layout, weight_type)
    ]
    for row in rows:
        print(
            f"{row['layout']:10} {row['weight_type']:8} {row['megabytes']:8} MB  "
            f"pack {row['pack_mb_s']:6} MB/s  unpack {row['unpack_mb_s']:6} MB/s"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
