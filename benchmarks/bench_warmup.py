"""What compiling a model's launches costs the CPU before it serves: one core, all, from the cache.

    python benchmarks/bench_warmup.py                      # sm_90's launches, no GPU needed
    python benchmarks/bench_warmup.py --csv benchmarks/results/cpu/warmup.csv

Kernels are compiled for an H200 with a faked driver, into a new cache, and then found in it.
Nothing is loaded or launched, so this is the compiler's part of a start and no more. `wait_ms` is
the longest that another Python thread (weights are read meanwhile) waited for the interpreter.
"""

import csv
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer

from bench_launch import FakedDriver, cpu_model

# Llama-3 8B on one GPU: out_features x in_features of qkv, o, gate_up and down.
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
MAX_TOKENS = 8192
TICK = 0.002
COLUMNS = ("cpu", "triton", "torch", "case", "threads", "launches", "binaries")
COLUMNS += ("wall_s", "cpu_s", "busy_cores", "wait_ms")


class Ticker:
    """A thread that wants the interpreter all the time, and the longest that it had to wait."""

    def __init__(self) -> None:
        self.longest, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.ended.is_set():
            start = time.perf_counter()
            time.sleep(TICK)
            self.longest = max(self.longest, time.perf_counter() - start - TICK)

    def __enter__(self) -> "Ticker":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def cpu_seconds() -> float:
    """Of this process and of those that it waited for (ptxas)."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in both)


def measure(case: str, threads: int) -> dict[str, object]:
    """Compile every launch of every layer once."""
    from fusedq_kernels import warmup
    from fusedq_kernels.catalogue import TRITON_GEMM
    from fusedq_kernels.choose.device import device_by_name
    from fusedq_kernels.cuda.ahead import AheadCompiler
    from fusedq_kernels.cuda.gemm_kernel import fused_gemm_kernel
    from fusedq_kernels.layouts import packing
    from fusedq_kernels.types import Layout, QuantSpec, WeightType

    act, launches, found = torch.bfloat16, [], []
    spec, h200 = QuantSpec(WeightType.UINT4B8, 128, act), device_by_name("h200")
    for n, k in LAYERS:
        packed = packing.empty_packed(Layout.P4, n, k, spec, 0, act, "meta")
        reached = warmup.reachable(TRITON_GEMM, packed, h200, MAX_TOKENS)
        launches.extend((each, packed) for each in reached)

    def work() -> None:
        for reached, packed in launches:
            warmup.run_once(reached, TRITON_GEMM, packed, act)

    fused_gemm_kernel.device_caches.clear()
    triton.knobs.compilation.listener = lambda **facts: found.append(facts["cache_hit"])
    wall, cpu = time.perf_counter(), cpu_seconds()
    with Ticker() as ticker:
        AheadCompiler(work, threads=threads).wait()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    assert len(set(found)) == 1, "all of a case is compiled, or found in the cache"
    return {
        "cpu": cpu_model(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "case": case,
        "threads": threads,
        "launches": len(launches),
        "binaries": len(found),
        "wall_s": f"{wall:.2f}",
        "cpu_s": f"{cpu:.2f}",
        "busy_cores": f"{cpu / wall:.2f}",
        "wait_ms": f"{1e3 * ticker.longest:.0f}",
    }


def main(
    file: Annotated[Path | None, typer.Option("--csv", help="append the rows to this file")] = None,
) -> None:
    triton.runtime.driver.set_active(FakedDriver())
    cores, rows = len(os.sched_getaffinity(0)), []
    for threads in sorted({1, cores}):
        with tempfile.TemporaryDirectory() as cache:
            triton.knobs.cache.dir = cache
            rows.append(measure("first start", threads))
            rows.append(measure("second start", threads))
    for row in rows:
        print(", ".join(f"{name} {row[name]}" for name in COLUMNS[3:]))
    if file is None:
        return
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
