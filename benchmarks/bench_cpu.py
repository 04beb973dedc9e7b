"""cpu-fused beside stock vLLM's operator, torch's own and the unquantized layer, in one run.

    python benchmarks/bench_cpu.py benchmarks/results/cpu/kernels.csv
    python benchmarks/bench_cpu.py benchmarks/results/cpu/kernels.csv --plot-only

Then the experts of a layer (rows of `n` features between the products and `k` before them), at one
token: `gbs` counts the experts that are asked, other ones in every round.

Takes a few minutes on two cores. Rounds are interleaved, so that whatever slows the machine slows
all alike; weights are cold, as many copies in turn as exceed the caches. Read bandwidth is what a
sum over 256 MB reaches in the same rounds. Only ratios mean anything: `percent_read` and `over_*`,
of medians.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.types import QuantSpec, WeightType
from gemmbench.cpu_experts import dense_experts, fused_experts, routings
from gemmbench.expert_shapes import MODELS, ExpertsShape
from gemmbench.results import ResultFile, environment
from vllm_fusedq.integration.operators import register_cpu_operators
from vllm_fusedq.measure.contenders import (
    READ,
    Contender,
    cold,
    copies,
    dense,
    fused,
    reading,
    timed,
)
from vllm_fusedq.measure.machine import describe
from vllm_fusedq.measure.random_weights import random_tokens, random_weight

DTYPE = torch.bfloat16
COLUMNS = (
    *("run", "n", "k", "m", "contender", "ms", "best_ms", "weight_mb", "gbs", "percent_read"),
    *("over_bf16", "over_stock", "gflops"),
)
OWN = (
    *(("uint4b8", 128), ("uint4b8", 32), ("uint4", 128), ("uint8b128", 128), ("uint8", 128)),
    *(("nf4", 64), ("fp4", 64), ("uint4b8", 16), ("uint4b8", 8), ("uint4b8", 48)),
    *(("float8_e4m3fn", 128), ("float4_e2m1f", 32)),
)
OWN_EXPERTS = (("uint4b8", 128), ("nf4", 64))
BF16, STOCK = "torch bf16", "vLLM cpu_gemm_wna16"

CPU = torch.device("cpu")

app = typer.Typer(add_completion=False)


def ours(kernel: str, n: int, k: int, weight_type: WeightType, group: int, name: str) -> Contender:
    logical = random_weight(n, k, QuantSpec(weight_type, group, DTYPE), CPU)
    packed = pack(logical, KERNELS[kernel].layout(weight_type), DTYPE)
    return fused(Call.of(packed, kernel, DTYPE), cold(packed), name)


def contenders(n: int, k: int, groups: tuple[tuple[str, int], ...]) -> Iterator[Contender]:
    yield reading(CPU)
    yield dense(n, k, DTYPE, CPU, BF16)
    if register_cpu_operators():
        yield ours("cpu-wna16", n, k, WeightType.UINT4B8, 128, STOCK)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // 128, n, 2).to(DTYPE)
    int4, size = torch.ops.aten._weight_int4pack_mm_for_cpu, first.nbytes + scales.nbytes
    packed = [first.clone() for _ in copies(size, CPU)]
    yield Contender(
        "torch int4 g128", [lambda x, out, w=w: int4(x, w, 128, scales) for w in packed], size
    )
    int8, per_channel = torch.ops.aten._weight_int8pack_mm, torch.rand(n).to(DTYPE)
    bytes_ = [torch.randint(-128, 127, (n, k), dtype=torch.int8) for _ in copies(n * k, CPU)]
    yield Contender(
        "torch int8", [lambda x, out, w=w: int8(x, w, per_channel) for w in bytes_], n * k
    )
    for name, group in groups:
        yield ours("cpu-fused", n, k, WeightType(name), group, f"cpu-fused {name} g{group}")


def layer(
    n: int, k: int, tokens: list[int], rounds: int, groups: tuple[tuple[str, int], ...]
) -> Iterator[dict[str, object]]:
    all_ = list(contenders(n, k, groups))
    for m in tokens:
        flop = 2 * m * n * k
        for row in measure(all_, random_tokens(m, k, DTYPE, CPU), n, rounds, flop):
            yield {"n": n, "k": k, "m": m} | row


def experts(
    shape: ExpertsShape, rounds: int, groups: tuple[tuple[str, int], ...], m: int = 1
) -> Iterator[dict[str, object]]:
    asked = routings(shape, m)
    all_ = [reading(CPU), dense_experts(shape, DTYPE, asked, BF16)]
    for name, group in groups:
        spec = QuantSpec(WeightType(name), group, DTYPE)
        all_.append(fused_experts(shape, spec, DTYPE, asked, f"cpu-fused {name} g{group}"))
    flop = 2 * m * shape.top_k * 3 * shape.inner * shape.hidden
    x = random_tokens(m, shape.hidden, DTYPE, CPU)
    for row in measure(all_, x, shape.hidden, rounds, flop):
        row["contender"] += f", top {shape.top_k} of {shape.count} experts"
        yield {"n": shape.inner, "k": shape.hidden, "m": m} | row


def measure(
    all_: list[Contender], x: torch.Tensor, n: int, rounds: int, flop: float
) -> Iterator[dict[str, object]]:
    """One row for each; the first is what reads."""
    times = timed(all_, x, n, rounds)
    time_of = {name: timing.us / 1e6 for name, timing in times.items()}
    read = all_[0].bytes / time_of[READ]
    for each in all_:
        seconds, multiplies = time_of[each.name], each.name != READ
        row: dict[str, object] = {"contender": each.name}
        best = times[each.name].best_us / 1e3
        row |= {"ms": f"{seconds * 1e3:.3f}", "best_ms": f"{best:.3f}"}
        row |= {"weight_mb": f"{each.bytes / 1e6:.1f}"}
        row |= {"gbs": f"{each.bytes / seconds / 1e9:.1f}"}
        row |= {"percent_read": f"{100 * each.bytes / seconds / read:.0f}"}
        if multiplies:
            row |= {"over_bf16": f"{time_of[BF16] / seconds:.2f}"}
            row |= {"gflops": f"{flop / seconds / 1e9:.0f}"}
        if multiplies and STOCK in time_of:
            row |= {"over_stock": f"{time_of[STOCK] / seconds:.2f}"}
        yield row


def plot(csv: Path) -> None:
    import matplotlib.pyplot as plt

    rows = pd.read_csv(csv, comment="#")
    rows = rows[rows.run == rows.run.iloc[-1]]
    size = f"{rows.n.iloc[0]} x {rows.k.iloc[0]}"
    rows = rows[(rows.n == rows.n.iloc[0]) & (rows.k == rows.k.iloc[0])]
    shown = (STOCK, "torch int4 g128", "cpu-fused uint4b8 g128", "cpu-fused uint8b128 g128")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(*_series(rows, READ, "gbs"), color="black", linestyle="--", label="read bandwidth")
    for number, name in enumerate((BF16, *shown, "cpu-fused nf4 g64")):
        style = {"marker": "o", "label": name, "color": f"C{number}"}
        left.plot(*_series(rows, name, "gbs"), **style)
        if name != BF16:
            right.plot(*_series(rows, name, "over_bf16"), **style)
    right.axhline(1, color="black", linestyle="--", label=BF16)
    left.set(title="Weight read, with metadata", ylabel="GB/s")
    right.set(title="Speed-up over the bf16 layer", ylabel="times")
    for axis in (left, right):
        axis.set(xlabel="tokens", xscale="log", ylim=(0, None))
        axis.set_xticks(sorted(rows.m.unique()), sorted(rows.m.unique()))
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.suptitle(f"{size} (out_features x in_features), {_cpu(csv)}")
    figure.savefig(csv.with_suffix(".png"), dpi=100)


def _series(rows: pd.DataFrame, name: str, column: str) -> tuple[pd.Series, pd.Series]:
    own = rows[rows.contender == name]
    return own.m, own[column]


def _cpu(csv: Path) -> str:
    lines = csv.read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("# device: ")), "")


@app.command()
def main(
    csv: Path,
    shapes: Annotated[str, typer.Option(help="N x K")] = "14336x4096,4096x14336",
    tokens: str = "1,2,4,8,16,32,64,128,512",
    rounds: int = 15,
    model: Annotated[str, typer.Option(help="of which experts are measured")] = "qwen3-30b-a3b",
    plot_only: bool = False,
) -> None:
    if not plot_only:
        file, header = ResultFile(csv, COLUMNS), environment(CPU)
        header["device"] = describe(CPU)
        for row in _rows(shapes, tokens, rounds, MODELS[model]):
            file.append([row], header)
            typer.echo(" ".join(str(value) for value in row.values()))
    plot(csv)


def _rows(
    shapes: str, tokens: str, rounds: int, mixture: ExpertsShape
) -> Iterator[dict[str, object]]:
    for shape in shapes.split(","):
        n, k = (int(size) for size in shape.split("x"))
        yield from layer(n, k, [int(m) for m in tokens.split(",")], rounds, OWN)
    # A round takes milliseconds, and visits one part of the layer
    yield from experts(mixture, 8 * rounds, OWN_EXPERTS)


if __name__ == "__main__":
    app()
