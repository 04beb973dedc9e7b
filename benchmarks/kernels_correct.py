"""Proves the kernels on the GPU that is here, before anything is timed.

    python benchmarks/kernels_correct.py              # real shapes, in pieces of nine minutes
    python benchmarks/kernels_correct.py --tiny       # every kernel on one small case: sanitizers
    python benchmarks/kernels_correct.py --dry-run    # no GPU: the same in the interpreter

Every weight type, group size and activation dtype against float64 on all outputs; the same bits in
repeated runs, on two streams and from a CUDA graph; every batch size alike in batch-invariant mode;
slices through cuBLAS against float64 and from a CUDA graph.
Results go to benchmarks/results/<device>/correct.csv; cases that passed at this commit are not run
again. Compiling takes longer than running, so that `--jobs` processes share the GPU. The exit
status is 1 if a check failed.
"""

# Typer reads defaults from the signature and copies them.
# ruff: noqa: B006

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gemmbench import exactness
from gemmbench.own import device_spec
from gemmbench.results import ResultFile, commit, environment, results_folder
from gemmbench.shapes import named_shapes

COLUMNS = ("run", "commit", "case", "check", "passed", "found")
# Around every border of the tile tables, and ragged.
TOKENS = (1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 300, 1024, 4096, 8192)
EVERY_TILE_TOKENS = (64, 300)
INVARIANT_TOKENS = range(1, 513)
SLICED_TOKENS = (65, 512, 4096)
RUNS = 100
TINY_SHAPES, TINY_TOKENS, TINY_RUNS = [(72, 272)], (1, 17, 70), 3
TINY_INVARIANT_TOKENS = (1, 17, 70)

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    shape_names: Annotated[list[str], typer.Option("--shapes")] = ["llama-3-8b"],
    tp: Annotated[list[int], typer.Option(help="tensor-parallel sizes")] = [1, 2],
    weight_type: Annotated[list[str], typer.Option(help="only these")] = [],
    tiny: Annotated[bool, typer.Option(help="small cases on the GPU")] = False,
    dry_run: Annotated[bool, typer.Option(help="small cases in the interpreter")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of correct.csv")] = None,
    seconds: Annotated[float, typer.Option(help="stop after this long")] = 540,
    jobs: Annotated[int, typer.Option(help="processes, to compile in parallel")] = 1,
    shard: Annotated[str, typer.Option(help="every b-th case from the a-th: a/b")] = "0/1",
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run checks in the interpreter")
    small = tiny or dry_run
    try:
        shapes = TINY_SHAPES if small else list(named_shapes(shape_names, tp))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    folder = out or results_folder(device_spec(device).name, small)
    if jobs > 1:
        raise typer.Exit(_run_jobs(jobs, folder))
    file = ResultFile(folder / "correct.csv", COLUMNS)
    first, step = (int(part) for part in shard.split("/"))
    cases = [
        case
        for case in exactness.cases(shapes, small)
        if not weight_type or case.spec.weight_type.value in weight_type
    ][first::step]
    raise typer.Exit(run_cases(cases, file, device, small, seconds))


def run_cases(
    cases: list[exactness.Case],
    file: ResultFile,
    device: torch.device,
    small: bool,
    seconds: float,
) -> int:
    """Run what has not passed at this commit; 1 if a check failed, else 0."""
    start, at = time.monotonic(), commit()
    passed = {
        (row["case"], row["check"])
        for row in file.rows()
        if row["commit"] == at and row["passed"] == "yes"
    }
    failures = done = 0
    for number, case in enumerate(cases, start=1):
        if time.monotonic() - start > seconds:
            print(f"stopped after {seconds:.0f} s, {len(cases) - number + 1} cases remain: again")
            break
        todo = [name for name in CHECKS if (case.name, name) not in passed]
        rows = [_run(case, name, device, small) | {"commit": at} for name in todo]
        if rows:
            file.append(rows, environment(device))
        for row in rows:
            failures += row["passed"] == "no"
            done += 1
            mark = "ok  " if row["passed"] == "yes" else "FAIL"
            head = f"{mark} [{number}/{len(cases)}] {case.name}, {row['check']}"
            print(f"{head}: {row['found']}", flush=True)
    print(f"{done} checks, {failures} failed; {file.path}")
    return 1 if failures else 0


def _run_jobs(jobs: int, folder: Path) -> int:
    """This command once per shard of the cases, all on the one GPU."""
    command = [sys.executable, *sys.argv, "--out", str(folder), "--jobs", "1"]
    running = [subprocess.Popen([*command, "--shard", f"{index}/{jobs}"]) for index in range(jobs)]
    return max(process.wait() for process in running)


def _right(subject: exactness.Subject, small: bool) -> str:
    if subject.device.type == "cpu":
        every_tile: tuple[int, ...] = ()
    # Tiles differ by the group's step: every one of them at the sizes that checkpoints use most.
    elif subject.case.spec.group_size in (64, 128):
        every_tile = TINY_TOKENS if small else EVERY_TILE_TOKENS
    else:
        every_tile = ()
    tokens = sorted({*(TINY_TOKENS if small else TOKENS), *every_tile})
    return "; ".join(exactness.check_right(subject, m, m in every_tile) for m in tokens)


def _repeatable(subject: exactness.Subject, small: bool) -> str:
    runs, tokens = (TINY_RUNS, (17,)) if small else (RUNS, (1, 64, 512))
    return "; ".join(exactness.check_repeatable(subject, m, runs) for m in tokens)


def _batch_invariant(subject: exactness.Subject, small: bool) -> str:
    tokens = TINY_INVARIANT_TOKENS if small else INVARIANT_TOKENS
    return exactness.check_batch_invariant(subject, list(tokens))


def _sliced(subject: exactness.Subject, small: bool) -> str:
    runs, tokens = (TINY_RUNS, (70,)) if small else (RUNS, SLICED_TOKENS)
    return "; ".join(exactness.check_sliced(subject, m, runs) for m in tokens)


CHECKS = {
    "right": _right,
    "repeatable": _repeatable,
    "batch-invariant": _batch_invariant,
    "sliced": _sliced,
}


def _run(case: exactness.Case, check: str, device: torch.device, small: bool) -> dict[str, object]:
    row = {"case": case.name, "check": check}
    try:
        found = CHECKS[check](exactness.Subject(case, device), small)
    except AssertionError as error:
        return row | {"passed": "no", "found": str(error)}
    except Exception as error:
        return row | {"passed": "no", "found": f"{type(error).__name__}: {error}"[:300]}
    return row | {"passed": "yes", "found": found}


if __name__ == "__main__":
    app()
