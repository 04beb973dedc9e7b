"""The open questions of the kernel's design, one command each.

    python benchmarks/experiments.py                # the questions and predictions
    python benchmarks/experiments.py 1              # runs one, or several
    python benchmarks/experiments.py 1 --dry-run    # no GPU: each variant, tiny, in the interpreter

Writes benchmarks/results/<device>/experiment-<number>.csv in the columns of `bench_gemm.py` (3 and
5: what is compared bit by bit). It stops after `--seconds`; the same command goes on. A variant
with a wrong answer is a row without a time.
"""

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench_gemm import ACT_DTYPES, Job, measure_all, remaining
from fusedq_kernels.types import WeightType
from gemmbench import comparison, weights
from gemmbench.experiments import EXPERIMENTS, Experiment, dry
from gemmbench.numerics import COLUMNS
from gemmbench.own import device_spec
from gemmbench.results import ResultFile, environment, results_folder

DRY_SHAPE = (256, 256)

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    number: Annotated[list[int] | None, typer.Argument(help="of the questions")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the CSV files")] = None,
    seconds: Annotated[float, typer.Option(help="stop after this long")] = 540,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU; times mean nothing")] = False,
) -> None:
    start = time.monotonic()
    unknown = [each for each in number or () if each not in EXPERIMENTS]
    if unknown:
        raise typer.BadParameter(f"no experiment {unknown}; there are 1 to {max(EXPERIMENTS)}")
    for each in number or EXPERIMENTS:
        print(describe(each))
    if not number:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run runs every variant on a CPU, tiny")
    folder = out or results_folder(device_spec(device).name, dry_run)
    for each in number:
        file = folder / f"experiment-{each}.csv"
        left = seconds - (time.monotonic() - start)
        experiment = dry(EXPERIMENTS[each], DRY_SHAPE) if dry_run else EXPERIMENTS[each]
        run(experiment, file, device, left, dry_run)


def describe(number: int) -> str:
    """The question with its prediction."""
    each = EXPERIMENTS[number]
    return (
        f"{number}. {each.title}\n   predicted: {each.prediction}\n   refuted by: {each.refuted_by}"
    )


def run(
    experiment: Experiment, path: Path, device: torch.device, seconds: float, small: bool
) -> None:
    """Measure what `path` does not hold yet."""
    if experiment.numerics is not None:
        count_bits(experiment, ResultFile(path, COLUMNS), device, small)
        return
    file = ResultFile(path)
    others, skipped = comparison.available(experiment.names) if experiment.names else ([], {})
    finished = {"experiment": file.finished()}
    jobs: dict[str, list[Job]] = defaultdict(list)
    layers = {}
    for case in experiment.cases:
        for n, k in case.shapes:
            dtype = ACT_DTYPES[case.act_dtype]
            spec = weights.default_spec(WeightType(case.weight_type), case.group_size, k, dtype)
            job = Job(n, k, spec, tuple(("experiment", m) for m in case.tokens))
            jobs[case.act_dtype].append(remaining(job, case.act_dtype, finished))
            layers[n, k] = [f"{n}x{k}"]
    contenders = [*experiment.variants, *others]
    for name, todo in jobs.items():
        measure_all(
            *(todo, {"experiment": file}, layers, contenders, skipped),
            *(ACT_DTYPES[name], device, seconds),
        )


def count_bits(experiment: Experiment, file: ResultFile, device: torch.device, small: bool) -> None:
    assert experiment.numerics is not None
    for row in experiment.numerics.rows(device, small):
        file.append([row], environment(device))
        cells = ("weight_type", "act_dtype", "variant", "quantity", "value")
        print(", ".join(str(row[cell]) for cell in cells), flush=True)
    print(file.path)


if __name__ == "__main__":
    app()
