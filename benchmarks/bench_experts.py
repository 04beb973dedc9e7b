"""Experts of a layer by our fused kernel and by vLLM's, in one run.

    python benchmarks/bench_experts.py                       # Qwen3-30B-A3B, 1 to 8192 tokens
    python benchmarks/bench_experts.py --model kimi-k2 --tp 8 --model mixtral-8x7b
    python benchmarks/bench_experts.py --model kimi-k2 --ep 8 --routing zipf
    python benchmarks/bench_experts.py --dry-run             # no GPU: every step on a CPU, tiny

Writes benchmarks/results/<device>/experts.csv. Each time is of the whole layer after the router:
sorting, both products, activation and sum; `fusedq-sort`, `-up`, `-down` and `-sum` are launches
of ours, each with what sorts. Calls are replayed from a CUDA graph with a routing of their own
each, so that experts come from HBM. `floor_us` is the least time that the device allows: experts
that were drawn, read once, or their products. A contender that computes something else has no
time. A run stops by itself after `--seconds`; with the same arguments it goes on.
"""

# Typer reads defaults from the signature and copies them.
# ruff: noqa: B006

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

# Triton reads this when it is imported: without a GPU its interpreter stands in.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusedq_kernels.types import QuantSpec, WeightType
from gemmbench.answers import MAX_RMS_ERROR
from gemmbench.contender import Unavailable
from gemmbench.expert_contenders import OWN_EXPERTS, ExpertsContender, PreparedExperts
from gemmbench.expert_layers import ROUTINGS, RandomExperts, expected, floor_seconds
from gemmbench.expert_shapes import MODELS, TOKENS
from gemmbench.own import device_spec
from gemmbench.results import ResultFile, Row, environment, results_folder
from gemmbench.vllm_experts import VLLM_EXPERTS
from vllm_fusedq.measure.random_weights import random_tokens
from vllm_fusedq.measure.roofline import rates_for
from vllm_fusedq.measure.timing import measure

ACT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CONTENDERS: tuple[ExpertsContender, ...] = (*OWN_EXPERTS, *VLLM_EXPERTS)
KEY = ("model", "tp", "ep", "weight_type", "group_size", "act_dtype", "m", "routing", "kernel")
COLUMNS = (
    *("run", *KEY, "hidden", "inner", "experts", "top_k", "touched"),
    *("version", "us", "iqr_us", "floor_us", "pct_floor", "rms_error", "detail"),
)
DRY_TOKENS = (1, 3, 20)
# Of one number of tokens: together they touch more than L2 holds.
DRAWS, DRY_DRAWS = 16, 2
CHECKED_TOKENS = 4

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[list[str], typer.Option()] = ["qwen3-30b-a3b"],
    tp: Annotated[int, typer.Option(help="ranks that cut every expert")] = 1,
    ep: Annotated[int, typer.Option(help="ranks that share out the experts")] = 1,
    weight_type: Annotated[WeightType, typer.Option()] = WeightType.UINT4B8,
    group_size: Annotated[int | None, typer.Option(help="the model's by default")] = None,
    act_dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    routing: Annotated[list[str], typer.Option()] = list(ROUTINGS),
    m: Annotated[list[int], typer.Option(help="only these numbers of tokens")] = [],
    contender: Annotated[list[str], typer.Option(help="only these")] = [],
    out: Annotated[Path | None, typer.Option(help="folder of the CSV file")] = None,
    seconds: Annotated[float, typer.Option(help="stop after this long")] = 540,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU; times mean nothing")] = False,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run exercises everything on a CPU")
    names = [each.name for each in CONTENDERS]
    for found, known in ((model, MODELS), (routing, ROUTINGS), (contender, names)):
        if unknown := [each for each in found if each not in known]:
            raise typer.BadParameter(f"unknown {unknown}; known: {', '.join(known)}")
    folder = out or results_folder(device_spec(device).name, dry_run)
    file = ResultFile(folder / "experts.csv", COLUMNS)
    done = {tuple(row[name] for name in KEY) for row in file.rows()}
    chosen = [each for each in CONTENDERS if not contender or each.name in contender]
    stop = time.monotonic() + seconds
    for name in ["dry-run"] if dry_run else model:
        try:
            shape = MODELS[name].on_rank(tp, ep)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        group = group_size or shape.group_size
        dtype = ACT_DTYPES[act_dtype]
        spec = QuantSpec(weight_type, shape.inner * tp if group < 0 else group, dtype)
        layer = RandomExperts(replace(shape, group_size=spec.group_size), spec, device)
        values = (name, tp, ep, weight_type.value, spec.group_size, act_dtype)
        about = dict(zip(KEY, values, strict=False))
        tokens = [each for each in (DRY_TOKENS if dry_run else TOKENS) if not m or each in m]
        problems = [(each, kind) for each in tokens for kind in routing]
        for each in chosen:
            left = [p for p in problems if _key(about, *p, each.name) not in done]
            draws = DRY_DRAWS if dry_run else DRAWS
            for row in _measured(each, layer, dtype, about, left, draws, stop):
                file.append([row], environment(device))
                cells = ("model", "m", "routing", "kernel", "us", "detail")
                print(", ".join(f"{row.get(cell, '-')}" for cell in cells), flush=True)
    print(file.path)


def _measured(
    contender: ExpertsContender,
    layer: RandomExperts,
    dtype: torch.dtype,
    about: Row,
    problems: Sequence[tuple[int, str]],
    draws: int,
    stop: float,
) -> Iterator[Row]:
    """Rows of one contender on one layer, for numbers of tokens and routings, until `stop`."""
    if not problems or time.monotonic() > stop:
        return
    try:
        version, prepared = contender.version(), contender.prepare(layer, dtype)
    except (Unavailable, ImportError) as error:
        print(f"skipped {contender.name}: {error}")
        return
    shape = layer.shape
    sizes = {"hidden": shape.hidden, "inner": shape.inner, "experts": shape.count}
    own = about | sizes | {"top_k": shape.top_k, "kernel": contender.name, "version": version}
    for m, routing in problems:
        if time.monotonic() > stop:
            return
        found = _timed(prepared, layer, dtype, m, routing, draws)
        yield own | {"m": m, "routing": routing} | found


def _key(about: Row, m: int, routing: str, kernel: str) -> tuple[str, ...]:
    row = about | {"m": m, "routing": routing, "kernel": kernel}
    return tuple(str(row[name]) for name in KEY)


def _timed(
    prepared: PreparedExperts,
    layer: RandomExperts,
    dtype: torch.dtype,
    m: int,
    routing: str,
    draws: int,
) -> Row:
    drawn = [layer.draw(m, routing, seed) for seed in range(draws)]
    x = random_tokens(m, layer.shape.hidden, dtype, layer.device)
    few = slice(0, CHECKED_TOKENS)
    first = drawn[0]
    try:
        y = prepared.run(x, first.weights, first.ids)
    except (RuntimeError, ValueError, AssertionError) as error:
        return {"detail": f"failed: {' '.join(str(error).split())[:200]}"}
    touched = sum(each.touched for each in drawn) / draws
    row: Row = {"touched": round(touched, 1), "detail": prepared.detail(m)}
    if prepared.checked:
        right = expected(layer, x[few], first.weights[few], first.ids[few])
        error = (y[few].double() - right).square().mean().sqrt() / right.square().mean().sqrt()
        row["rms_error"] = f"{error.item():.2e}"
        if not error <= MAX_RMS_ERROR:
            return row | {"detail": f"wrong: RMS error {error.item():.2e}"}
    calls = [lambda each=each: prepared.run(x, each.weights, each.ids) for each in drawn]
    timing = measure(calls, layer.device)
    row |= {"us": round(timing.us, 2), "iqr_us": round(timing.iqr_us, 2)}
    rates = rates_for(device_spec(layer.device))
    if rates is not None:
        floors = [
            floor_seconds(each, layer.shape, layer.spec, rates.hbm, rates.tensor) for each in drawn
        ]
        floor = 1e6 * sum(floors) / draws
        row |= {"floor_us": round(floor, 2), "pct_floor": round(100 * floor / timing.us, 1)}
    return row


if __name__ == "__main__":
    app()
