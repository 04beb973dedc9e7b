"""Reliability under load: a real `vllm serve --quantization fusedq` on a CPU, soaked and killed.

    python benchmarks/soak.py                                  # ten minutes of load, then ten kills
    python benchmarks/soak.py --seconds 60 --kills 0           # the load alone, for a minute
    python benchmarks/soak.py --tp 2 --seconds 120
    python benchmarks/soak.py --leak --kills 0                 # a worker that leaks: must fail

Load: at least --requests requests for at least --seconds, --concurrency at a time, in streams and
whole, a third given up by their clients midway, prompts of 3 to 330 and answers of 4 to 120 tokens,
greedy and sampled with seeds, half of them past the prefix cache. None may be lost, and each has
exactly the tokens and log-probabilities of the same request alone. The resident memory of all
processes of the server is sampled each second: its slope may be an eighth of what keeping each
request's hidden states would make it.

Kills: Ctrl-C, SIGTERM and SIGKILL to the server, SIGKILL to its engine or worker alone, at random
moments while it loads and while it serves. No process, file in /dev/shm or the temporary folder, or
port may be left, and the next server starts with the same caches and answers the same. What vLLM
leaves without this plugin too (--stock) is listed, and no failure: its shared memory, its sockets,
and the engine of a server that got SIGKILL.

Times mean nothing. Exit code 1 where anything failed.
"""

import asyncio
import json
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import soaking  # noqa: F401  finds local_server
from fusedq_kernels.native.build import library
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.user_cache import user_cache
from gemmbench.results import ROOT
from local_server import ServerDied, compile_arguments, free_port, serving
from soaking.asks import MODEL, MODEL_LENGTH, PROMPT_TOKENS
from soaking.kills import kills
from soaking.run import LOG_SHOWN, PATIENCE, Command, Home, Load, kill_many, soak
from soaking.verdict import AMX_TOLERANCE
from vllm_fusedq import __version__
from vllm_fusedq.measure.machine import describe

ASSETS = ROOT / "tests" / "assets"
LEAK_SHARE = 1 / 8
"""Of one request's hidden states, what memory may grow by with each request."""
SLOPE_SECONDS = 60
"""Of load, without which a slope says nothing: it is shown, and not judged."""

# A sample stays on its line
_SAMPLE = re.compile(r"\[\s+(\d+),\s+([\d.]+)\s+\]")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Option(help="a tiny checkpoint")] = ASSETS
    / "tiny-llama-gptq-g128",
    requests: Annotated[int, typer.Option(min=1)] = 1000,
    concurrency: Annotated[int, typer.Option(min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="of load, at least")] = 600,
    kill: Annotated[int, typer.Option("--kills", min=0, max=10)] = 10,
    tp: Annotated[int, typer.Option(help="tensor-parallel size")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    leak: Annotated[
        bool, typer.Option(help="have the worker keep a buffer of each request")
    ] = False,
    stock: Annotated[bool, typer.Option(help="vLLM without the plugin")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="file for what was found")] = None,
) -> None:
    console = Console(width=120)
    console.print(f"seed {seed}, {model.name}, tensor-parallel size {tp}")
    amx = torch.cpu._is_amx_tile_supported()
    load = Load(requests, concurrency, seconds, seed, AMX_TOLERANCE if amx else 0.0)
    arguments, env = options(tp, leak, stock)
    found: dict[str, Any] = {"what": about(model, tp, stock, load)}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        log = Path(folder) / "server.log"
        started = time.monotonic()
        try:
            with serving(model, log, arguments, PATIENCE, **env) as server:
                loading_seconds = time.monotonic() - started
                found |= asyncio.run(soak(server, load))
        except ServerDied as error:
            found["problems"] = [f"the server did not start: {str(error)[-LOG_SHOWN:]}"]
            loading_seconds = 0.0
        if memory := found.get("memory"):
            memory["tolerance_mb_per_minute"] = tolerance(model, memory["requests_per_minute"])
            too_short = seconds < SLOPE_SECONDS
            if not too_short and memory["slope_mb_per_minute"] > memory["tolerance_mb_per_minute"]:
                found["problems"].append(
                    "memory grows by {slope_mb_per_minute} MB a minute".format_map(memory)
                )
            print_load(console, found)
        if kill and loading_seconds:
            found["kills"] = []
            command = Command(model, arguments, free_port(), Home(Path(folder) / "home"), env)
            struck = kills(seed, kill, compiling=not stock and compiles())
            for each in kill_many(command, struck, loading_seconds, seed):
                found["kills"].append(each)
                found["problems"] += [f"{each['kill']}: {why}" for why in each["problems"]]
                console.print(f"{each['kill']}: {'; '.join(each['problems']) or 'clean'}")
            print_kills(console, found["kills"])
    for problem in found["problems"]:
        console.print(problem, style="red", markup=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1)
        out.write_text(_SAMPLE.sub(r"[\1, \2]", text) + "\n")
    console.print("failed" if found["problems"] else "nothing lost, nothing wrong, nothing left")
    raise typer.Exit(bool(found["problems"]))


def options(tp: int, leak: bool, stock: bool) -> tuple[list[str], dict[str, str]]:
    """Arguments of `vllm serve`, and its environment."""
    arguments = [*compile_arguments(), "--served-model-name", MODEL]
    arguments += ["--max-model-len", str(MODEL_LENGTH), "--num-gpu-blocks-override", "512"]
    # Split prefills of requests with a seed end the engine on a CPU, vLLM 0.32 without plugin too
    arguments += ["--tensor-parallel-size", str(tp), "--no-enable-chunked-prefill"]
    env = {"VLLM_PLUGINS": "none" if stock else "fusedq", "VLLM_CPU_INT4_W4A8": "0"}
    if not stock:
        arguments += ["--quantization", "fusedq"]
    if leak:
        arguments += ["--worker-cls", "soaking.leak.LeakingWorker"]
        env["PYTHONPATH"] = str(Path(__file__).parent)
    if tp > 1:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(tp))
    return arguments, env


def compiles() -> bool:
    """Whether a start with an empty cache compiles cpu-fused."""
    return library(this_isa()).parent == user_cache("cpu")


def tolerance(model: Path, requests_per_minute: float) -> float:
    """MB a minute."""
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    states = sum(PROMPT_TOKENS) / len(PROMPT_TOKENS) * hidden * 2
    return round(states * LEAK_SHARE * requests_per_minute / 1e6, 2)


def about(model: Path, tp: int, stock: bool, load: Load) -> dict[str, Any]:
    """What a result file says of its run."""
    import vllm

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "fusedq": __version__,
        "command": " ".join(Path(word).name for word in sys.argv),
        "machine": describe(torch.device("cpu")),
        "vllm": vllm.__version__,
        "torch": version("torch"),
        "model": model.name,
        "tensor_parallel_size": tp,
        "side": "stock" if stock else "fusedq",
        "concurrency": load.concurrency,
        "seed": load.seed,
        "tolerance_nats": load.tolerance,
    }


def print_load(console: Console, found: dict[str, Any]) -> None:
    table = Table(title="load", show_edge=False)
    table.add_column("what")
    table.add_column("found", justify="right")
    for name, value in (*found["requests"].items(), *found["memory"].items()):
        if name != "samples":
            table.add_row(name.replace("_", " "), str(value))
    console.print(table)


def print_kills(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="kills", show_edge=False)
    for column in ("kill", "processes ended after", "left", "left by vLLM alone too"):
        table.add_column(column)
    for row in rows:
        ours = len(row["processes"]) + len(row["files"]) + row["port_taken"]
        table.add_row(row["kill"], f"{row['seconds']} s", str(ours), str(len(row["by_vllm"])))
    console.print(table)


if __name__ == "__main__":
    app()
