"""fusedq inside real vLLM against stock vLLM: one checkpoint, the same engine and settings.

    python benchmarks/serve_compare.py --model llama-3-8b --model qwen2.5-7b
    python benchmarks/serve_compare.py --dry-run --side fusedq       # no GPU: a tiny model on a CPU

Sides: stock (what vLLM chooses; the kernel is recorded), marlin (the same with Machete disabled),
bf16 (the unquantized model, dummy weights) and fusedq. Weights are random, written on the spot in a
real quantizer's layout. Each side is an engine process of its own with CUDA graphs and
torch.compile as vLLM has them by default. Decode is the difference of two lengths, so that prefill
does not count; loading is taken apart by vLLM's own log. Rows go to
benchmarks/results/<device>/serving.csv; a side that is there for this commit is not run again.
"""

# Typer reads defaults from the signature and copies them.
# ruff: noqa: B006

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from gemmbench.own import device_spec
from gemmbench.results import RESULTS, ResultFile, Row, commit, environment
from gemmbench.shapes import MODELS, ModelShape
from random_checkpoint import LAYOUTS, config, write_random_checkpoint

COLUMNS = ("run", "commit", "model", "layout", "side", "metric", "value", "spread", "kernels")
TINY = ModelShape(256, 512, 2, 4, 2, head_dim=64, vocab=512)
WORKER = Path(__file__).parent / "gemmbench" / "engine_worker.py"
MIN_SECONDS_PER_SIDE = 150
ENGINE_TIMEOUT_SECONDS = 570


@dataclass(frozen=True)
class Side:
    """How one engine is started; `quantized` is false where it gets the 16-bit model."""

    quantization: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    quantized: bool = True


SIDES = {
    "stock": Side(),
    "marlin": Side(env={"VLLM_DISABLED_KERNELS": "MacheteLinearKernel,CutlassW4A8LinearKernel"}),
    "bf16": Side(quantized=False),
    "fusedq": Side(quantization="fusedq"),
}
# The engine's log, by the metric it gives: seconds, except for the memory. Repacking and warm-up
# are this plugin's own; stock vLLM counts them within its loading.
LOG = {
    "load_read_s": r"Loading weights took ([\d.]+) seconds",
    "load_total_s": r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds",
    "memory_gib": r"Model loading took ([\d.]+) GiB",
    "repack_s": r"repacking: ([\d.]+) s",
    "warm_up_s": r"warm-up: ([\d.]+) s",
    "graph_capture_s": r"Graph capturing finished in ([\d.]+) secs",
    "compile_s": r"torch\.compile took ([\d.]+) s",
    "init_engine_s": r"init engine \(.*?\) took ([\d.]+) s",
}
FULL = {
    "engine": {
        **{"max_model_len": 8448, "max_num_batched_tokens": 8192, "max_num_seqs": 128},
        "gpu_memory_utilization": 0.85,
    },
    **{"batches": [1, 8, 32, 128], "prefills": [512, 1024, 2048, 4096, 8192]},
    **{"prompt_tokens": 16, "decode_tokens": [16, 144], "repeats": 5},
}
DRY = {
    "engine": {"max_model_len": 64, "enforce_eager": True, "max_num_seqs": 4},
    **{"batches": [1, 2], "prefills": [16]},
    **{"prompt_tokens": 4, "decode_tokens": [2, 6], "repeats": 2},
}
app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[list[str], typer.Option(help="names of gemmbench.shapes")] = ["llama-3-8b"],
    layout: Annotated[list[str], typer.Option(help=", ".join(LAYOUTS))] = ["gptq"],
    side: Annotated[list[str], typer.Option(help=", ".join(SIDES))] = [*SIDES],
    work: Annotated[Path | None, typer.Option(help="folder of the checkpoints")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of serving.csv and logs")] = None,
    seconds: Annotated[float, typer.Option(help="start no engine that ends later")] = 560,
    dry_run: Annotated[bool, typer.Option(help="a tiny model on a CPU")] = False,
) -> None:
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not dry_run:
        raise typer.BadParameter("no CUDA device here; --dry-run serves a tiny model on a CPU")
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
    done = {(r["model"], r["layout"], r["side"]) for r in file.rows() if r["commit"] == at}
    todo = [
        (name, kind, one)
        for name in models
        for kind in layout
        for one in side
        if (name, kind, one) not in done
    ]
    for number, (name, kind, one) in enumerate(todo):
        left = seconds - (time.monotonic() - start)
        if left < MIN_SECONDS_PER_SIDE and not dry_run:
            print(f"{left:.0f} s left: {len(todo) - number} engines remain, run it again")
            break
        checkpoint = checkpoint_for(known[name], name, kind, SIDES[one], work, device)
        log = folder / "logs" / f"{name}-{kind}-{one}.log"
        measured = run_side(checkpoint, SIDES[one], DRY if dry_run else FULL, device, log)
        cell = {"commit": at, "model": name, "layout": kind, "side": one}
        file.append([{**cell, **row} for row in measured], environment(device))
        head = "; ".join(f"{row['metric']} {row['value']}" for row in measured)
        print(f"[{number + 1}/{len(todo)}] {name} {kind} {one}: {head}", flush=True)
    print_ratios(file)
    print(file.path)


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


def run_side(
    checkpoint: Path, side: Side, request: dict[str, Any], device: torch.device, log: Path
) -> list[Row]:
    """Rows of one engine process; its output goes to `log`. Exits where the engine dies."""
    engine = {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "load_format": "auto" if side.quantized else "dummy",
        **request["engine"],
    }
    if side.quantization:
        engine["quantization"] = side.quantization
    env = {
        **os.environ,
        **{"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"},
        **{"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"},
        **side.env,
    }
    if device.type == "cpu":
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0"}
        env.pop("TRITON_INTERPRET", None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request | {"engine": engine}))
        command = [sys.executable, str(WORKER), str(asked), str(answer)]
        with log.open("w") as output:
            subprocess.run(
                command,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=ENGINE_TIMEOUT_SECONDS,
            )
        text = log.read_text()
        if not answer.exists():
            sys.exit(f"the engine died; the end of {log}:\n{text[-6000:]}")
        return metrics(json.loads(answer.read_text()), text)


def metrics(answer: dict[str, Any], log: str) -> list[Row]:
    """Rows from an engine's answer (medians and half the range) and from vLLM's log."""
    kernels = " ".join(f"{name}:{count}" for name, count in sorted(answer["kernels"].items()))
    rows: list[Row] = [{"metric": "start_s", "value": round(answer["start_s"], 2)}]
    for name, pattern in LOG.items():
        found = re.findall(pattern, log)
        if found:
            rows.append({"metric": name, "value": round(sum(map(float, found)), 3)})
    for name, values in answer.items():
        if name.startswith(("decode-", "prefill-")):
            spread = (max(values) - min(values)) / 2
            value = round(statistics.median(values), 2)
            rows.append({"metric": f"{name}_tok_s", "value": value, "spread": round(spread, 2)})
    return [{**row, "kernels": kernels} for row in rows]


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
