"""cpu-fused beside stock vLLM's operator, torch's own and the unquantized layer, in one run.

    python benchmarks/bench_cpu.py benchmarks/results/cpu/kernels.csv
    python benchmarks/bench_cpu.py benchmarks/results/cpu/kernels.csv --plot-only

Rounds are interleaved, so that whatever slows the machine slows all alike; weights are cold, as
many copies in turn as exceed the caches. Read bandwidth is what a sum over 256 MB reaches in the
same rounds. Only ratios mean anything: `percent_read` and `over_*`, of medians.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import pandas as pd
import torch
import typer

from fusedq_kernels import ops
from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.choose.device import cpu_device
from fusedq_kernels.layouts.packing import pack, weight_bytes
from fusedq_kernels.types import LogicalWeight, PackedWeight, QuantSpec, WeightType
from gemmbench.results import ResultFile, environment
from vllm_fusedq.integration.operators import register_cpu_operators

DTYPE = torch.bfloat16
# Of all copies of a weight: more than the last-level cache of the machines at hand.
COLD_BYTES = 100e6
COLUMNS = (
    *("run", "n", "k", "m", "contender", "ms", "best_ms", "weight_mb", "gbs", "percent_read"),
    *("over_bf16", "over_stock", "gflops"),
)
OWN = (
    *(("uint4b8", 128), ("uint4b8", 32), ("uint4", 128), ("uint8b128", 128), ("uint8", 128)),
    *(("nf4", 64), ("fp4", 64), ("uint4b8", 16), ("uint4b8", 8), ("uint4b8", 48)),
)
READ, BF16, STOCK = "read", "torch bf16", "vLLM cpu_gemm_wna16"

app = typer.Typer(add_completion=False)
Run = Callable[[torch.Tensor, torch.Tensor], object]


@dataclass
class Contender:
    """`runs` are equal but for their copy of the weight, of `bytes` each."""

    name: str
    runs: list[Run]
    bytes: float
    seconds: list[float] = field(default_factory=list)

    def once(self, round_: int, x: torch.Tensor, out: torch.Tensor) -> None:
        run = self.runs[round_ % len(self.runs)]
        start = time.perf_counter()
        run(x, out)
        self.seconds.append(time.perf_counter() - start)


def copies(size: float) -> range:
    return range(max(2, math.ceil(COLD_BYTES / size)))


def random_weight(n: int, k: int, weight_type: WeightType, group: int) -> LogicalWeight:
    groups = -(-k // group)
    spec = QuantSpec(weight_type, group, DTYPE)
    codes = torch.randint(0, 1 << weight_type.bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, groups) * 0.01 + 0.001).to(DTYPE)
    zeros = torch.randint(0, 1 << weight_type.bits, (n, groups), dtype=torch.uint8)
    return LogicalWeight(codes, scales, zeros if spec.has_zero_points else None, spec)


def ours(kernel: str, logical: LogicalWeight, name: str) -> Contender:
    weight_type = logical.spec.weight_type
    packed = pack(logical, KERNELS[kernel].layout(weight_type), DTYPE)
    size = sum(weight_bytes(packed).values())

    def call(one: PackedWeight) -> Run:
        run = ops.prepared(Call.of(one, kernel, DTYPE).text).launched(kernel, None)
        return lambda x, out: run(x, one.qweight, one.scales, one.zeros, None, out)

    def copy() -> PackedWeight:
        zeros = None if packed.zeros is None else packed.zeros.clone()
        return replace(
            packed, qweight=packed.qweight.clone(), scales=packed.scales.clone(), zeros=zeros
        )

    return Contender(name, [call(copy()) for _ in copies(size)], size)


def contenders(n: int, k: int, groups: tuple[tuple[str, int], ...]) -> Iterator[Contender]:
    big = torch.ones(64 << 20)
    yield Contender(READ, [lambda x, out: big.sum()], big.nbytes)
    dense = [torch.randn(n, k).to(DTYPE) for _ in copies(2 * n * k)]
    linear = torch.nn.functional.linear
    yield Contender(BF16, [lambda x, out, w=w: linear(x, w) for w in dense], 2 * n * k)
    if register_cpu_operators():
        yield ours("cpu-wna16", random_weight(n, k, WeightType.UINT4B8, 128), STOCK)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // 128, n, 2).to(DTYPE)
    int4, size = torch.ops.aten._weight_int4pack_mm_for_cpu, first.nbytes + scales.nbytes
    packed = [first.clone() for _ in copies(size)]
    yield Contender(
        "torch int4 g128", [lambda x, out, w=w: int4(x, w, 128, scales) for w in packed], size
    )
    int8, per_channel = torch.ops.aten._weight_int8pack_mm, torch.rand(n).to(DTYPE)
    bytes_ = [torch.randint(-128, 127, (n, k), dtype=torch.int8) for _ in copies(n * k)]
    yield Contender(
        "torch int8", [lambda x, out, w=w: int8(x, w, per_channel) for w in bytes_], n * k
    )
    for name, group in groups:
        weight = random_weight(n, k, WeightType(name), group)
        yield ours("cpu-fused", weight, f"cpu-fused {name} g{group}")


def measure(
    n: int, k: int, tokens: list[int], rounds: int, groups: tuple[tuple[str, int], ...]
) -> Iterator[dict[str, object]]:
    all_ = list(contenders(n, k, groups))
    for m in tokens:
        x, out = torch.randn(m, k).to(DTYPE), torch.empty(m, n, dtype=DTYPE)
        for each in all_:
            each.once(0, x, out)
            each.seconds.clear()
        for round_ in range(rounds):
            for each in all_:
                each.once(round_, x, out)
        time_of = {each.name: median(each.seconds) for each in all_}
        read = all_[0].bytes / time_of[READ]
        for each in all_:
            seconds, multiplies = time_of[each.name], each.name != READ
            row: dict[str, object] = {"n": n, "k": k, "m": m, "contender": each.name}
            row |= {"ms": f"{seconds * 1e3:.3f}", "best_ms": f"{min(each.seconds) * 1e3:.3f}"}
            row |= {"weight_mb": f"{each.bytes / 1e6:.1f}"}
            row |= {"gbs": f"{each.bytes / seconds / 1e9:.1f}"}
            row |= {"percent_read": f"{100 * each.bytes / seconds / read:.0f}"}
            if multiplies:
                row |= {"over_bf16": f"{time_of[BF16] / seconds:.2f}"}
                row |= {"gflops": f"{2 * m * n * k / seconds / 1e9:.0f}"}
            if multiplies and STOCK in time_of:
                row |= {"over_stock": f"{time_of[STOCK] / seconds:.2f}"}
            yield row


def plot(csv: Path) -> None:
    import matplotlib.pyplot as plt

    rows = pd.read_csv(csv, comment="#")
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
    figure.savefig(csv.with_suffix(".png"), dpi=130)


def _series(rows: pd.DataFrame, name: str, column: str) -> tuple[pd.Series, pd.Series]:
    own = rows[rows.contender == name]
    return own.m, own[column]


def _cpu(csv: Path) -> str:
    lines = csv.read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("# device: ")), "")


def describe() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{model.partition(': ')[2]}, {threads} threads, {cpu_device().cpu_isa}"


@app.command()
def main(
    csv: Path,
    shapes: Annotated[str, typer.Option(help="N x K")] = "14336x4096,4096x14336",
    tokens: str = "1,2,4,8,16,32,64,128,512",
    rounds: int = 15,
    plot_only: bool = False,
) -> None:
    if not plot_only:
        file, header = ResultFile(csv, COLUMNS), environment(torch.device("cpu"))
        header["device"] = describe()
        for shape in shapes.split(","):
            n, k = (int(size) for size in shape.split("x"))
            for row in measure(n, k, [int(m) for m in tokens.split(",")], rounds, OWN):
                file.append([row], header)
                typer.echo(" ".join(str(value) for value in row.values()))
    plot(csv)


if __name__ == "__main__":
    app()
