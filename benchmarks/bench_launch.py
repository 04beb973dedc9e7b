"""What one layer call outside a CUDA graph costs the CPU, up to Triton's C launcher.

    python benchmarks/bench_launch.py                              # kernels of sm_90, no GPU needed
    python benchmarks/bench_launch.py --csv benchmarks/results/cpu/launch.csv --label after
    python benchmarks/bench_launch.py --on cuda                    # the real driver and GPU

Kernels are compiled for sm_90 as on a GPU; the driver is faked, so that the C launcher, which would
hand the kernel to a GPU, does nothing. Times are of this process on its CPU, in microseconds per
call, the least of several rounds. Memory comes from malloc in place of PyTorch's GPU allocator.
With `--on cuda` all is real, and `torch.mm` of 16-bit weights stands beside; fewer calls than the
driver queues are made at once, so that no call waits for the GPU.
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

# The driver queues 1024 launches.
ROUNDS, CALLS = 9, 300
DRY_ROUNDS, DRY_CALLS = 1, 2
TOKENS = (1, 16, 64, 512, 2048)
DRY_TOKENS, DRY_N, DRY_K = (1,), 256, 512
COLUMNS = ("label", "cpu", "triton", "torch", "layer", "tokens", "launch", "part", "us")

app = typer.Typer(add_completion=False)


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


class Clock:
    """Times calls on a device; a GPU has finished all before a round begins."""

    def __init__(self, place: torch.device, rounds: int = ROUNDS, calls: int = CALLS) -> None:
        self.place, self.rounds, self.calls = place, rounds, calls

    def least(self, call: Callable[[], object]) -> float:
        """Microseconds of a call in the quickest of some rounds."""
        call()
        call()
        seconds = []
        for _ in range(self.rounds):
            if self.place.type == "cuda":
                torch.cuda.synchronize(self.place)
            start = time.process_time()
            for _ in range(self.calls):
                call()
            seconds.append(time.process_time() - start)
        return min(seconds) / self.calls * 1e6


def parts_of(n: int, k: int, m: int, clock: Clock) -> tuple[str, dict[str, float]]:
    """The launch of a layer of uint4b8 in groups of 128, and what its call costs, by part."""
    from fusedq_kernels import ops
    from fusedq_kernels.call import Call
    from fusedq_kernels.choose.device import current_device, device_by_name
    from fusedq_kernels.prepared import prepared
    from fusedq_kernels.types import GemmShape, QuantSpec, WeightType
    from gemmbench.weights import packed_for_gpu
    from vllm_fusedq.measure.random_weights import random_weight

    least, place = clock.least, clock.place
    cuda = place.type == "cuda"
    device = current_device(place) if cuda else device_by_name("sm_90")
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
    packed = packed_for_gpu(random_weight(n, k, spec, place), torch.bfloat16)
    weight = (packed.qweight, packed.scales, packed.zeros)
    text = Call.of(packed, "triton-gemm", torch.bfloat16).text
    zeros = {"dtype": torch.bfloat16, "device": place}
    x, out = (torch.zeros((m, width), **zeros) for width in (k, n))
    ready = prepared(text)
    launch = ready.kernel.launch(GemmShape(m, n, k), spec, device)
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
    if cuda:
        dense = torch.zeros((n, k), **zeros).t()
        parts["torch.mm of 16-bit weights"] = least(lambda: torch.mm(x, dense, out=out))
    return launch.source, parts


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


@app.command(help=__doc__)
def main(
    file: Annotated[Path | None, typer.Option("--csv", help="append the rows to this file")] = None,
    label: Annotated[str, typer.Option(help="what the rows are of")] = "",
    n: Annotated[int, typer.Option(help="out_features")] = 3072,
    k: Annotated[int, typer.Option(help="in_features")] = 4096,
    on: Annotated[str, typer.Option(help="cpu, with a faked driver, or cuda")] = "cpu",
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU; times mean nothing")] = False,
) -> None:
    if on not in ("cpu", "cuda"):
        raise typer.BadParameter(f"unknown device {on!r}; known: cpu, cuda")
    if dry_run:
        on, n, k = "cpu", DRY_N, DRY_K
    if on == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; --on cpu fakes its driver")
    torch.set_num_threads(1)
    if on == "cpu":
        triton.runtime.driver.set_active(FakedDriver())
    clock = Clock(torch.device(on), *((DRY_ROUNDS, DRY_CALLS) if dry_run else ()))
    rows = []
    for m in DRY_TOKENS if dry_run else TOKENS:
        launch, parts = parts_of(n, k, m, clock)
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
    app()
