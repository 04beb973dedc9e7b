"""Compiles on all processors what is timed later, so that timing waits for no compiler.

    python benchmarks/prewarm.py --jobs 16
    python benchmarks/prewarm.py --dry-run     # no GPU: one of them, in the interpreter

Triton keeps what it compiles in a folder that later processes read. A kernel's binary depends on
the weight's scheme and the tile, not on its size, hence each runs once on a small weight: the tiles
of experiments 9 and 10, and what the rules choose for Llama-3 8B. The exit status is 1 if one
failed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.types import DeviceSpec, GemmShape, QuantSpec, TileConfig, WeightType
from gemmbench.experiments import EXPERIMENTS
from gemmbench.own import device_spec
from gemmbench.shapes import DECODE_TOKENS, PREFILL_TOKENS, named_shapes
from gemmbench.variants import Decoders, Variant
from gemmbench.weights import default_spec, default_specs, packed_for_gpu
from vllm_fusedq.measure.random_weights import random_tokens, random_weight
from vllm_fusedq.measure.undecoded_triton import decoding

TIMED_EXPERIMENTS = (9, 10)
WEIGHT_TYPES = (WeightType.UINT4B8, WeightType.UINT4, WeightType.UINT8B128, WeightType.NF4)
KERNEL = "triton-gemm"
# The widest tile divides N, and no split of the rules is left without a block of K.
SMALL_WEIGHT, DRY_WEIGHT, DRY_COUNT = (1024, 4096), (256, 512), 1

app = typer.Typer(add_completion=False)


class Compilation(NamedTuple):
    """What makes one binary."""

    spec: QuantSpec
    tile: TileConfig
    decoders: Decoders = ()


@app.command(help=__doc__)
def main(
    jobs: Annotated[int, typer.Option(help="processes")] = os.cpu_count() or 1,
    shard: Annotated[str, typer.Option(help="every b-th from the a-th: a/b")] = "0/1",
    dry_run: Annotated[bool, typer.Option(help="one of them, in the interpreter")] = False,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run runs one in the interpreter")
    if jobs > 1:
        raise typer.Exit(_run_jobs(jobs))
    first, step = (int(part) for part in shard.split("/"))
    todo = list(dict.fromkeys(compilations(device_spec(device))))[first::step]
    todo = todo[:DRY_COUNT] if dry_run else todo
    start, failed = time.monotonic(), 0
    for each in todo:
        try:
            run(each, device, DRY_WEIGHT if dry_run else SMALL_WEIGHT)
        except Exception as error:
            failed += 1
            print(f"FAILED {each}: {type(error).__name__}: {error}"[:300], flush=True)
    print(f"{len(todo)} kernels, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    raise typer.Exit(bool(failed))


def compilations(device: DeviceSpec) -> Iterator[Compilation]:
    """Everything that the timed steps launch in bf16, some of it more than once."""
    for number in TIMED_EXPERIMENTS:
        experiment = EXPERIMENTS[number]
        for case in experiment.cases:
            for (n, k), m in ((shape, m) for shape in case.shapes for m in case.tokens):
                spec = default_spec(case.weight_type, case.group_size, k, torch.bfloat16)
                for each in experiment.variants:
                    if isinstance(each, Variant):
                        tile = each.tile_at(GemmShape(m, n, k), spec, device)
                        yield Compilation(spec, tile, each.decoders)
    for weight_type in WEIGHT_TYPES:
        for n, k in named_shapes(["llama-3-8b"], [1]):
            for spec in default_specs(weight_type, (), k, torch.bfloat16):
                for m in (*DECODE_TOKENS, *PREFILL_TOKENS):
                    tile = select(GemmShape(m, n, k), spec, device).tile
                    if tile is not None:
                        yield Compilation(spec, tile)


def run(each: Compilation, device: torch.device, weight: tuple[int, int]) -> None:
    """Compile by launching once."""
    n, k = weight
    packed = packed_for_gpu(random_weight(n, k, each.spec, device), torch.bfloat16)
    x = random_tokens(min(64, each.tile.block_m), k, torch.bfloat16, device)
    out = x.new_empty((x.shape[0], n))
    with decoding(dict(each.decoders)):
        launch = KERNELS[KERNEL].prepare(Call.of(packed, KERNEL, x.dtype), each.tile)
        launch(x, packed.qweight, packed.scales, packed.zeros, None, out)


def _run_jobs(jobs: int) -> int:
    """This command once per shard, all on the one GPU."""
    command = [sys.executable, *sys.argv, "--jobs", "1"]
    running = [subprocess.Popen([*command, "--shard", f"{index}/{jobs}"]) for index in range(jobs)]
    return max(process.wait() for process in running)


if __name__ == "__main__":
    app()
