"""What one layer call outside a CUDA graph costs the CPU, up to Triton's C launcher.

    python benchmarks/bench_launch.py                              # kernels of sm_90, no GPU needed
    python benchmarks/bench_launch.py --csv benchmarks/results/cpu/launch.csv --label after

Kernels are compiled for sm_90 as on a GPU; the driver is faked, so that the C launcher, which would
hand the kernel to a GPU, does nothing. Times are of this process on its CPU, in microseconds per
call, the least of several rounds. Memory comes from malloc in place of PyTorch's GPU allocator.
"""

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget

ROUNDS, CALLS = 9, 300
TOKENS = (1, 16, 64, 512, 2048)
COLUMNS = ("label", "cpu", "triton", "torch", "layer", "tokens", "launch", "part", "us")


class _Utils:
    """The driver's entries that a launch uses, without a GPU behind them."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 100, 0, 1024

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0


class FakedDriver:
    """An H200 of which only Triton's C launcher is missing."""

    utils = _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def least(call: Callable[[], object]) -> float:
    """Microseconds of a call in the quickest of some rounds."""
    call()
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        seconds.append(time.process_time() - start)
    return min(seconds) / CALLS * 1e6


def parts_of(n: int, k: int, m: int) -> tuple[str, dict[str, float]]:
    """The launch of a layer of uint4b8 in groups of 128, and what its call costs, by part."""
    from fusedq_kernels import ops, testing
    from fusedq_kernels.call import Call
    from fusedq_kernels.choose.device import device_by_name
    from fusedq_kernels.layouts import packing
    from fusedq_kernels.prepared import prepared
    from fusedq_kernels.types import GemmShape, Layout, QuantSpec, WeightType

    spec = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
    packed = packing.pack(testing.random_logical(n, k, spec), Layout.P4, torch.bfloat16)
    weight = (packed.qweight, packed.scales, packed.zeros)
    text = Call.of(packed, "triton-gemm", torch.bfloat16).text
    x, out = (torch.zeros((m, width), dtype=torch.bfloat16) for width in (k, n))
    ready = prepared(text)
    launch = ready.kernel.launch(GemmShape(m, n, k), spec, device_by_name("sm_90"))
    run = ready.run(x.device, m)
    parts = {
        "whole call of matmul_out": least(
            lambda: torch.ops.fusedq.matmul_out(out, x, *weight, None, None, text)
        ),
        "of it, without the dispatch": least(
            lambda: ops._matmul_out(out, x, *weight, None, None, text)
        ),
        "of it, checking operands": least(lambda: prepared(text).check(x, *weight, None, None)),
        "of it, finding what runs": least(lambda: ready.run(x.device, m)),
        "of it, launching": least(lambda: run(x, *weight, None, out)),
    }
    return launch.source, parts


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def main(
    file: Annotated[Path | None, typer.Option("--csv", help="append the rows to this file")] = None,
    label: Annotated[str, typer.Option(help="what the rows are of")] = "",
    n: Annotated[int, typer.Option(help="out_features")] = 3072,
    k: Annotated[int, typer.Option(help="in_features")] = 4096,
) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(FakedDriver())
    rows = []
    for m in TOKENS:
        launch, parts = parts_of(n, k, m)
        print(f"{m} tokens, {launch}")
        for part, us in parts.items():
            print(f"  {us:7.1f} us  {part}")
            cells = (label, cpu_model(), triton.__version__, torch.__version__, f"{n}x{k}", m)
            rows.append((*cells, launch, part, f"{us:.1f}"))
    if file is None:
        return
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    typer.run(main)
