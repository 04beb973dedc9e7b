"""Measures tiles and writes the rows that `heuristics.select` reads: tuned/<device>.json.

    python benchmarks/tune.py --shapes llama-3-8b --tp 1 --tp 2 --weight-type uint4b8
    python benchmarks/tune.py --dry-run                      # no GPU: every step on a CPU, tiny

Every time goes to benchmarks/results/<device>/tune.csv at once; the rows are made from that file.
A run stops by itself after `--seconds`, and the same command goes on where it stopped. A tile whose
answer is wrong is not timed. Shapes are finished when all their token buckets are.
"""

# Typer reads defaults from the signature and copies them.
# ruff: noqa: B006

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import KNOWN_DEVICES
from fusedq_kernels.types import GemmShape, Launch, QuantSpec, TileConfig, WeightType
from gemmbench import shapes, weights
from gemmbench.comparison import weight_types
from gemmbench.own import device_spec
from gemmbench.results import Problem, ResultFile, Row, commit, environment, results_folder
from vllm_fusedq.measure import candidates
from vllm_fusedq.measure.tuner import Job, Measured, Trial, Tuner

COLUMNS = (
    *("run", "weight_type", "group_size", "act_dtype", "n", "k", "m", "kernel"),
    *(*candidates.TILE_FIELDS, "us", "iqr_us", "note"),
)
BUCKETS = (*candidates.DECODE_BUCKETS, *candidates.PREFILL_BUCKETS)
DRY_BUCKETS = (8, 64, candidates.MIN_SLICED_M)

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    shape_names: Annotated[list[str], typer.Option("--shapes")] = ["llama-3-8b"],
    tp: Annotated[list[int], typer.Option(help="tensor-parallel sizes")] = [1],
    weight_type: Annotated[list[str], typer.Option()] = ["uint4b8"],
    group_size: Annotated[list[int], typer.Option(help="-1: per channel")] = [],
    bucket: Annotated[list[int], typer.Option(help="only these numbers of tokens")] = [],
    keep: Annotated[int, typer.Option(help="tiles measured per bucket")] = 16,
    out: Annotated[Path | None, typer.Option(help="folder of tune.csv")] = None,
    tuned: Annotated[Path | None, typer.Option(help="folder of <device>.json")] = None,
    seconds: Annotated[float, typer.Option(help="stop after this long")] = 540,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU; times mean nothing")] = False,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run exercises everything on a CPU")
    hardware = device_spec(device)
    if hardware.name not in KNOWN_DEVICES:
        raise typer.BadParameter(
            f"{hardware.name} is not in KNOWN_DEVICES of fusedq_kernels.choose.device; "
            "add it there first"
        )
    try:
        chosen = shapes.named_shapes(["dry-run"] if dry_run else shape_names, tp)
        types = weight_types(weight_type)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    out = out or results_folder(hardware.name, dry_run)
    file = ResultFile(out / "tune.csv", COLUMNS)
    finished = file.finished()
    jobs = [
        Job(n, k, spec, tuple(m for m in buckets if _problem(n, k, spec, m) not in finished))
        for buckets in [bucket or (DRY_BUCKETS if dry_run else BUCKETS)]
        for each in types
        for n, k in chosen
        for spec in weights.default_specs(each, group_size, k, torch.bfloat16)
    ]
    tuner = Tuner(device, hardware, keep=keep, more_stages=candidates.NEAR_STAGES)
    measure_all(jobs, file, tuner, seconds)
    tuned = tuned or (out if dry_run else tuning.FOLDER)
    write_rows(file, tuned / f"{hardware.name}.json")


def measure_all(jobs: Sequence[Job], file: ResultFile, tuner: Tuner, seconds: float) -> None:
    """Measure until everything is done or the time is up, writing each bucket at once."""
    total, done = sum(len(job.tokens) for job in jobs), 0
    for found in tuner.run(jobs, seconds):
        problem = _problem(found.job.n, found.job.k, found.job.spec, found.m)._asdict()
        rows = [{**problem, **_cells(t.launch), **_result(t)} for t in found.trials]
        file.append(rows, environment(tuner.device))
        done = found.done
        left = f"[{done}/{total}, about {found.remaining:.0f} s left]"
        size = f"{found.job.spec.weight_type.value} n={found.job.n} k={found.job.k} m={found.m}"
        print(f"{left} {size}: {_describe(found)}", flush=True)
    if done < total:
        print(f"stopped after {seconds:.0f} s, {total - done} buckets remain: run it again")


def write_rows(file: ResultFile, path: Path) -> None:
    """Make the rows of this Triton from every measurement; tables of others stay as they are."""
    rows = candidates.tuned_rows(_measurement(row) for row in file.rows() if row["us"])
    if not rows:
        print("no shape is finished yet: nothing written")
        return
    triton, date = version("triton"), datetime.now(UTC).date().isoformat()
    table = tuning.TunedTable(path.stem, triton, date, commit(), tuple(rows))
    minor = triton.split(".")[:2]
    others = [t for t in _tables(path) if t.triton.split(".")[:2] != minor]
    tuning.write(path, [*others, table])
    print(f"{len(rows)} rows in {path}")


def _tables(path: Path) -> tuple[tuning.TunedTable, ...]:
    return tuning.read(path) if path.exists() else ()


def _measurement(row: dict[str, str]) -> candidates.Measurement:
    shape = GemmShape(int(row["m"]), int(row["n"]), int(row["k"]))
    spec = weights.default_spec(
        WeightType(row["weight_type"]), int(row["group_size"]), shape.k, torch.bfloat16
    )
    cells = {name: row[name] for name in candidates.TILE_FIELDS if row[name]}
    tile = TileConfig(**{name: _parse(text) for name, text in cells.items()}) if cells else None
    return candidates.Measurement(shape, spec, tile, float(row["us"]), row["kernel"])


def _cells(launch: Launch) -> Row:
    tile = dict.fromkeys(candidates.TILE_FIELDS, "") if launch.tile is None else asdict(launch.tile)
    return {"kernel": launch.kernel, **tile}


def _parse(text: str) -> int | bool:
    return text == "True" if text in ("True", "False") else int(text)


def _problem(n: int, k: int, spec: QuantSpec, m: int) -> Problem:
    return Problem(spec.weight_type.value, spec.group_size, "bfloat16", n, k, m)


def _result(trial: Trial) -> Row:
    if trial.timing is None:
        return {"us": "", "note": trial.note}
    return {"us": round(trial.timing.us, 3), "iqr_us": round(trial.timing.iqr_us, 3)}


def _describe(found: Measured) -> str:
    if (best := found.best) is None:
        return "no tile is right"
    words = f"{best.timing.us:.3f} us, {best.launch.kernel}"
    if (tile := best.launch.tile) is not None:
        sizes = "{block_m}x{block_n} split {split_k} warps {num_warps} stages {num_stages}"
        words = f"{best.timing.us:.3f} us, {sizes.format(**asdict(tile))}"
    rules = found.trials[0].timing
    return words + (f", the rules' tile {rules.us:.3f} us" if rules else "")


if __name__ == "__main__":
    app()
