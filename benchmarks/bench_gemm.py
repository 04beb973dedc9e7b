"""Our fused kernel against everything else that multiplies by a quantized weight, in one run.

    python benchmarks/bench_gemm.py                          # Llama-3 8B, decode and prefill
    python benchmarks/bench_gemm.py --shapes qwen2.5-72b --tp 4 --weight-type uint4
    python benchmarks/bench_gemm.py --roofline               # predictions, no GPU needed
    python benchmarks/bench_gemm.py --dry-run                # no GPU: every step on a CPU, tiny

Writes benchmarks/results/<device>/gemm_decode.csv and gemm_prefill.csv. A run stops by itself after
`--seconds`; start it again with the same arguments and it goes on. Weights are read from HBM (more
copies than L2 holds), calls are replayed from a CUDA graph, times are medians with their
interquartile range. A contender that computes something else is dropped with its error.
"""

# Typer reads defaults from the signature and copies them.
# ruff: noqa: B006

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusedq_kernels.types import QuantSpec
from gemmbench import comparison, shapes, weights
from gemmbench.own import device_spec
from gemmbench.results import Problem, ResultFile, environment, results_folder

ACT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PHASES = {"decode": shapes.DECODE_TOKENS, "prefill": shapes.PREFILL_TOKENS}
DRY_TOKENS = {"decode": (1, 3), "prefill": (66,)}

app = typer.Typer(add_completion=False)


class Job(NamedTuple):
    """One weight, and the (phase, tokens) for which it is to be measured."""

    n: int
    k: int
    spec: QuantSpec
    tokens: tuple[tuple[str, int], ...]


@app.command(help=__doc__)
def main(
    shape_names: Annotated[list[str], typer.Option("--shapes")] = ["llama-3-8b"],
    tp: Annotated[list[int], typer.Option(help="tensor-parallel sizes")] = [1],
    weight_type: Annotated[list[str], typer.Option()] = ["uint4b8"],
    group_size: Annotated[list[int], typer.Option(help="-1: per channel")] = [],
    act_dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    phase: Annotated[list[str], typer.Option()] = ["decode", "prefill"],
    m: Annotated[list[int], typer.Option(help="only these numbers of tokens")] = [],
    contender: Annotated[list[str], typer.Option(help="only these, and cublas")] = [],
    out: Annotated[Path | None, typer.Option(help="folder of the CSV files")] = None,
    seconds: Annotated[float, typer.Option(help="stop after this long")] = 540,
    roofline: Annotated[bool, typer.Option(help="print predictions, measure nothing")] = False,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU; times mean nothing")] = False,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (dry_run or roofline):
        raise typer.BadParameter(
            "no CUDA device here; --dry-run exercises everything on a CPU, --roofline predicts"
        )
    tokens = DRY_TOKENS if dry_run else PHASES
    try:
        chosen = shapes.named_shapes(["dry-run"] if dry_run else shape_names, tp)
        types = comparison.weight_types(weight_type)
        wanted = [(name, x) for name in phase for x in tokens[name] if not m or x in m]
        dtype = ACT_DTYPES[act_dtype]
        contenders, skipped = comparison.available(contender)
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(str(error)) from error
    folder = out or results_folder(device_spec(device).name, dry_run)
    files = {name: ResultFile(folder / f"gemm_{name}.csv") for name in phase}
    jobs = [
        Job(n, k, spec, tuple(wanted))
        for each in types
        for n, k in chosen
        for spec in weights.default_specs(each, group_size, k, dtype)
    ]
    if roofline:
        print_roofline(jobs, files, act_dtype, device)
        return
    finished = {name: file.finished() for name, file in files.items()}
    jobs = [remaining(job, act_dtype, finished) for job in jobs]
    measure_all(jobs, files, chosen, contenders, skipped, dtype, device, seconds)


def remaining(job: Job, act_dtype: str, finished: dict[str, set[Problem]]) -> Job:
    """The part of a job that no file holds yet."""
    spec = job.spec
    problem = Problem(spec.weight_type.value, spec.group_size, act_dtype, job.n, job.k, 0)
    return job._replace(
        tokens=tuple(
            (phase, m) for phase, m in job.tokens if problem._replace(m=m) not in finished[phase]
        )
    )


def measure_all(
    jobs: Sequence[Job],
    files: dict[str, ResultFile],
    layers: dict[tuple[int, int], list[str]],
    contenders: list[comparison.Contender],
    skipped: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> None:
    """Measure until everything is done or the time is up, writing each problem at once."""
    start = time.monotonic()
    folder = next(iter(files.values())).path.parent
    marker = comparison.CrashMarker(folder / ".running.json")
    culprit = marker.culprit()
    if culprit:
        contenders = [each for each in contenders if each.name != culprit]
        skipped[culprit] = f"the last run died in it; delete {folder / '.running.json'} to retry"
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    header = environment(device) | {
        "contenders": "; ".join(f"{each.name}: {each.version()}" for each in contenders),
        "skipped": "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "none",
    }
    total, done = sum(len(job.tokens) for job in jobs), 0
    for job in jobs:
        if not job.tokens or time.monotonic() - start > seconds:
            continue
        weight = comparison.Comparison(contenders, job.n, job.k, job.spec, dtype, device, marker)
        for name, reason in weight.refused.items():
            print(f"  not for {job.spec.weight_type.value} {job.n}x{job.k}: {name}: {reason}")
        for phase, m in job.tokens:
            if time.monotonic() - start > seconds:
                break
            names = " ".join(layers[job.n, job.k])
            rows = [{**row, "layers": names} for row in weight.measure(m)]
            files[phase].append(rows, header)
            done += 1
            rest = (time.monotonic() - start) / done * (total - done)
            print(f"[{done}/{total}, about {rest:.0f} s left] {summary(rows)}", flush=True)
    for name, file in files.items():
        print(f"{name}: {file.path}")
    if done < total:
        print(f"stopped after {seconds:.0f} s, {total - done} problems remain: run it again")


def summary(rows: Sequence[dict[str, object]]) -> str:
    """One problem on one line: each contender's time, or why it has none."""
    first = rows[0]
    cells = [
        f"{row['kernel']} {row['us']} us" if row["us"] else f"{row['kernel']} {row['detail']}"
        for row in rows
    ]
    size = "{weight_type} n={n} k={k} m={m}".format(**first)
    return f"{size}: {', '.join(cells)}"


def print_roofline(
    jobs: Sequence[Job], files: dict[str, ResultFile], act_dtype: str, device: torch.device
) -> None:
    """Predictions for our kernel on the GPU that is here, else an H200, beside measured times."""
    keys = ("weight_type", "group_size", "n", "k", "m")
    measured = {
        tuple(r[name] for name in keys): float(r["us"])
        for file in files.values()
        for r in file.rows()
        if r["kernel"] == "fusedq" and r["us"] and r["act_dtype"] == act_dtype
    }
    table = Table(title=f"static roofline, {device_spec(device).name}", show_edge=False)
    for column in (
        *("weight", "group", "N", "K", "M", "launch"),
        *("us", "limited by", "measured us", "ratio"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for job in jobs:
        for _, m in job.tokens:
            found, launch = comparison.predict(job.n, job.k, m, job.spec, device)
            problem = (job.spec.weight_type.value, job.spec.group_size, job.n, job.k, m)
            key = tuple(map(str, problem))
            us, model = measured.get(key), found.get("model_us")
            ratio = f"{us / model:.2f}" if us and model else ""
            cells = (launch.source, model or "", found.get("model_limit", ""), us or "", ratio)
            table.add_row(*key, *map(str, cells))
    Console(width=140).print(table)


if __name__ == "__main__":
    app()
