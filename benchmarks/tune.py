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
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusedq_kernels import ops
from fusedq_kernels.choose import tuning
from fusedq_kernels.choose.device import KNOWN_DEVICES
from fusedq_kernels.types import (
    GemmShape,
    Launch,
    PackedWeight,
    QuantSpec,
    TileConfig,
    WeightType,
)
from gemmbench import candidates, shapes, weights
from gemmbench.answers import Answer
from gemmbench.comparison import weight_types
from gemmbench.own import device_spec
from gemmbench.results import Problem, ResultFile, Row, commit, environment, results_folder
from gemmbench.roofline import rates_for
from vllm_fusedq.measure.random_weights import random_tokens, random_weight
from vllm_fusedq.measure.timing import copies_for, measure

KERNEL = "triton-gemm"
COLUMNS = (
    *("run", "weight_type", "group_size", "act_dtype", "n", "k", "m", "kernel"),
    *(*candidates.TILE_FIELDS, "us", "iqr_us", "rms_error", "note"),
)
BUCKETS = (*candidates.DECODE_BUCKETS, *candidates.PREFILL_BUCKETS)
DRY_BUCKETS = (8, 64, candidates.MIN_SLICED_M)

app = typer.Typer(add_completion=False)


class Job(NamedTuple):
    """One weight, and the token buckets that are not measured yet."""

    n: int
    k: int
    spec: QuantSpec
    buckets: tuple[int, ...]


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
    measure_all(jobs, file, keep, device, seconds)
    tuned = tuned or (out if dry_run else tuning.FOLDER)
    write_rows(file, tuned / f"{hardware.name}.json")


def measure_all(
    jobs: Sequence[Job], file: ResultFile, keep: int, device: torch.device, seconds: float
) -> None:
    """Measure until everything is done or the time is up, writing each bucket at once."""
    start = time.monotonic()
    total, done = sum(len(job.buckets) for job in jobs), 0
    for job in jobs:
        if not job.buckets or time.monotonic() - start > seconds:
            continue
        weight = Weight(job.n, job.k, job.spec, device)
        for m in job.buckets:
            if time.monotonic() - start > seconds:
                break
            rows = weight.measure(m, keep)
            file.append(rows, environment(device))
            done += 1
            rest = (time.monotonic() - start) / done * (total - done)
            timed = [row for row in rows if row["us"]]
            best = min(timed, key=lambda row: float(row["us"]), default=None)
            result = "no tile is right" if best is None else _describe(best, rows[0])
            size = f"{job.spec.weight_type.value} n={job.n} k={job.k} m={m}"
            print(f"[{done}/{total}, about {rest:.0f} s left] {size}: {result}", flush=True)
    if done < total:
        print(f"stopped after {seconds:.0f} s, {total - done} buckets remain: run it again")


class Weight:
    """Copies of one packed weight that together exceed L2, and its tiles' times."""

    def __init__(self, n: int, k: int, spec: QuantSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._logical = random_weight(n, k, spec, device)
        self._bias = random_tokens(1, n, torch.bfloat16, device, seed=2)[0]
        first = self._pack()
        count = copies_for(weights.packed_bytes(first), device)
        self._copies = [first, *(self._pack() for _ in range(count - 1))]

    def measure(self, m: int, keep: int) -> list[Row]:
        """A row per candidate, the rules' choice first; those that fail have no time.

        `keep` bounds the tiles; sliced-cublas comes beside them.
        """
        n, k = self._logical.codes.shape
        hardware = device_spec(self._device)
        rates = rates_for(hardware)
        assert rates is not None, "every known device has rates"
        tiles = candidates.candidates(GemmShape(m, n, k), self._spec, hardware, rates, keep)
        x = random_tokens(m, k, torch.bfloat16, self._device)
        answer = Answer(x, self._logical)
        problem = _problem(n, k, self._spec, m)._asdict()
        launches = [Launch(KERNEL, tile, "candidate") for tile in tiles]
        if m >= candidates.MIN_SLICED_M:
            launches.append(Launch("sliced-cublas", None, "candidate"))
        return [
            {**problem, **_cells(launch), **self._time(launch, x, answer)} for launch in launches
        ]

    def _pack(self) -> PackedWeight:
        return weights.packed_for_gpu(self._logical, torch.bfloat16)

    def _time(self, launch: Launch, x: torch.Tensor, answer: Answer) -> Row:
        try:
            for bias in (self._bias, None):
                errors = answer.errors(ops.run(x, self._copies[0], bias, launch), bias)
                if errors.verdict:
                    return {"us": "", "note": f"WRONG: {errors.verdict}"}
            calls = [
                lambda packed=packed: ops.run(x, packed, None, launch) for packed in self._copies
            ]
            timing = measure(calls, self._device)
        except Exception as error:
            # Too much shared memory, for one; a broken CUDA context fails every later row as well.
            return {"us": "", "note": f"FAILED: {type(error).__name__}: {error}"[:200]}
        times = {"us": round(timing.us, 3), "iqr_us": round(timing.iqr_us, 3)}
        return {**times, "rms_error": f"{errors.rms:.2e}"}


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


def _describe(best: Row, rules: Row) -> str:
    tile = "{block_m}x{block_n} split {split_k} warps {num_warps} stages {num_stages}"
    chosen = tile.format(**best) if best["block_m"] else best["kernel"]
    against = f", the rules' tile {rules['us']} us" if rules["us"] else ""
    return f"{best['us']} us, {chosen}{against}"


if __name__ == "__main__":
    app()
