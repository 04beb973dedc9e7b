"""fusedq inside real vLLM against stock vLLM: one checkpoint, the same engine and settings.

    python benchmarks/serve_compare.py --model llama-3-8b --model qwen2.5-7b
    python benchmarks/serve_compare.py --together --side fusedq --side stock     # in minutes
    python benchmarks/serve_compare.py --dry-run --side fusedq       # no GPU: a tiny model on a CPU

Sides: stock (what vLLM chooses; the kernel is recorded), marlin (the same with Machete disabled),
bf16 (the unquantized model, dummy weights) and fusedq. Weights are random, written on the spot in a
real quantizer's layout. Each side is an engine process of its own with CUDA graphs and
torch.compile as vLLM has them by default. Decode is the difference of two lengths, so that prefill
does not count; loading is taken apart by vLLM's own log. Rows go to
benchmarks/results/<device>/serving.csv; a side that is there for this commit is not run again. With
`--together` the sides start side by side and measure one after the other, fewer sizes and repeats.
"""

# Typer reads defaults from the signature and copies them.
# ruff: noqa: B006

import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from gemmbench.engines import DRY, FULL, SIDES, TOGETHER, EngineDied, Side, Start, run_engines
from gemmbench.own import device_spec
from gemmbench.results import RESULTS, ResultFile, commit, environment
from gemmbench.shapes import MODELS, ModelShape
from random_checkpoint import LAYOUTS, config, write_random_checkpoint

COLUMNS = ("run", "commit", "model", "layout", "side", "metric", "value", "spread", "kernels")
TINY = ModelShape(256, 512, 2, 4, 2, head_dim=64, vocab=512)
MIN_SECONDS_PER_SIDE = 150
ENGINE_TIMEOUT_SECONDS = 570

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[list[str], typer.Option(help="names of gemmbench.shapes")] = ["llama-3-8b"],
    layout: Annotated[list[str], typer.Option(help=", ".join(LAYOUTS))] = ["gptq"],
    side: Annotated[list[str], typer.Option(help=", ".join(SIDES))] = [*SIDES],
    work: Annotated[Path | None, typer.Option(help="folder of the checkpoints")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of serving.csv and logs")] = None,
    together: Annotated[bool, typer.Option(help="start the sides side by side")] = False,
    seconds: Annotated[float, typer.Option(help="start no engine that ends later")] = 560,
    dry_run: Annotated[bool, typer.Option(help="a tiny model on a CPU")] = False,
) -> None:
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run serves a tiny model on a CPU")
    if find_spec("vllm") is None:
        raise typer.BadParameter("vllm is not installed; pip install vllm")
    known = {"tiny": TINY} if dry_run else MODELS
    models = ["tiny"] if dry_run else model
    for given, allowed in ((models, known), (layout, LAYOUTS), (side, SIDES)):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise typer.BadParameter(f"unknown {unknown}; known: {', '.join(allowed)}")
    work = work or Path(tempfile.mkdtemp(prefix="serve_compare-"))
    folder = out or (work / "results" if dry_run else RESULTS / device_spec(device).name)
    file = ResultFile(folder / "serving.csv", COLUMNS)
    at = commit()
    # Of an engine that was ended early the last row is missing: it runs again.
    done = {
        (r["model"], r["layout"], r["side"])
        for r in file.rows()
        if r["commit"] == at and r["metric"] == "measured_s"
    }
    todo = [
        (name, kind, one)
        for name in models
        for kind in layout
        for one in side
        if (name, kind, one) not in done
    ]
    settings = DRY if dry_run else TOGETHER if together else FULL
    died = False
    for number, group in enumerate(groups := _groups(todo, together)):
        left = seconds - (time.monotonic() - start)
        if left < MIN_SECONDS_PER_SIDE and not dry_run:
            print(
                f"{left:.0f} s left: {len(groups) - number} of {len(groups)} remain, run it again"
            )
            break
        starts = {}
        for name, kind, one in group:
            checkpoint = checkpoint_for(known[name], name, kind, SIDES[one], work, device)
            log = folder / "logs" / f"{name}-{kind}-{one}.log"
            starts[f"{name}-{kind}-{one}"] = Start(checkpoint, SIDES[one], log)
        limit = min(ENGINE_TIMEOUT_SECONDS, left) if together else ENGINE_TIMEOUT_SECONDS
        answers = run_engines(starts, settings, device.type == "cpu", limit)
        for (name, kind, one), measured in zip(group, answers.values(), strict=True):
            label = f"[{number + 1}/{len(groups)}] {name} {kind} {one}"
            if isinstance(measured, EngineDied):
                died = True
                print(f"{label}: {measured}", file=sys.stderr)
                continue
            cell = {"commit": at, "model": name, "layout": kind, "side": one}
            file.append([{**cell, **row} for row in measured], environment(device))
            died |= all(row["metric"] != "measured_s" for row in measured)
            head = "; ".join(f"{row['metric']} {row['value']}" for row in measured)
            print(f"{label}: {head}", flush=True)
    print_ratios(file)
    print(file.path)
    raise typer.Exit(died)


Engine = tuple[str, str, str]


def _groups(todo: list[Engine], together: bool) -> list[list[Engine]]:
    """What starts side by side: the sides of one model and layout, or each alone."""
    if not together:
        return [[each] for each in todo]
    cells = dict.fromkeys((name, kind) for name, kind, _ in todo)
    return [[each for each in todo if each[:2] == cell] for cell in cells]


def checkpoint_for(
    shape: ModelShape, name: str, layout: str, side: Side, work: Path, device: torch.device
) -> Path:
    """The model's folder, written if it is not there; for the 16-bit side its config alone."""
    folder = work / f"{name}-{layout if side.quantized else 'bf16'}"
    marker = folder / "config.json"
    if not marker.exists():
        if side.quantized:
            write_random_checkpoint(folder, shape, layout, device=device)
        else:
            folder.mkdir(parents=True)
            marker.write_text(json.dumps(config(shape, None), indent=1))
    if side.quantized:
        # Every side finds the files in the page cache.
        for weights in sorted(folder.glob("*.safetensors")):
            with weights.open("rb") as opened:
                while opened.read(1 << 26):
                    pass
    return folder


def print_ratios(file: ResultFile) -> None:
    """fusedq over each other side, metric by metric; of runs at several commits the last."""
    values = {
        (r["model"], r["layout"], r["metric"], r["side"]): float(r["value"]) for r in file.rows()
    }
    others = [name for name in SIDES if name != "fusedq"]
    table = Table(title="fusedq / other side", show_edge=False)
    for column in ("model", "layout", "metric", "fusedq", *others):
        table.add_column(column, justify="right", no_wrap=True)
    for (*key, side), ours in values.items():
        if side == "fusedq":
            theirs = [values.get((*key, other)) for other in others]
            ratios = [f"{ours / value:.3f}" if value else "" for value in theirs]
            table.add_row(*key, f"{ours:g}", *ratios)
    Console(width=140).print(table)


if __name__ == "__main__":
    app()
