"""CPU tokens per second of fusedq against stock vLLM on the same checkpoint, in one run.

    python benchmarks/bench_cpu_serving.py --csv benchmarks/results/cpu_serving.csv

Both sides keep full-precision activations (`VLLM_CPU_INT4_W4A8=0`; stock vLLM's default on AMX
machines quantizes them to int8). Each measurement is an engine process of its own; the sides
alternate, so that a machine that slows down slows both. Only the ratios mean anything.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "tests" / "assets" / "tiny-llama-gptq-g128"
SIDES = ("stock", "fusedq")
# (name, batch, prompt tokens, generated tokens)
Case = tuple[str, int, int, int]
CASES: tuple[Case, ...] = (
    ("decode-1", 1, 16, 96),
    ("decode-8", 8, 16, 64),
    ("prefill-8x128", 8, 128, 1),
)
MIN_REPEATS, MIN_SECONDS = 5, 4.0
COLUMNS = ("model", "case", "side", "repeat", "seconds", "tokens_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="engine processes per side")
    parser.add_argument("--models", nargs="+", default=["demo", "larger"])
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        model, side, *cases = arguments.worker
        print("RESULT " + json.dumps(measure(model, side, cases)))
        return
    with tempfile.TemporaryDirectory() as folder:
        from gemmbench.shapes import ModelShape
        from random_checkpoint import write_random_checkpoint

        larger = Path(folder) / "random-llama-0.4b-gptq"
        shape = ModelShape(2048, 5632, layers=8, heads=16, kv_heads=4, vocab=512)
        write_random_checkpoint(larger, shape, "gptq", DEMO_MODEL)
        known = {"demo": DEMO_MODEL, "larger": larger}
        models = [known[name] for name in arguments.models]
        rows = [
            row
            for model in models
            for repeat in range(arguments.repeats)
            for side in SIDES
            for row in run_side(model, side, repeat)
        ]
    write_rows(arguments.csv, rows)
    print_ratios(rows, SIDES)


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def run_side(
    model: Path, side: str, repeat: int, cases: Sequence[Case] = CASES
) -> list[dict[str, object]]:
    """The rows of one engine process; `side` is "fusedq", or anything else for vLLM's own."""
    env = {
        **os.environ,
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--csv", os.devnull, "--worker", str(model), side]
    command += [name for name, *_ in cases]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not result:
        sys.exit(f"{' '.join(command)} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    seconds = json.loads(result[0].removeprefix("RESULT "))
    return [
        {
            "model": model.name,
            "case": name,
            "side": side,
            "repeat": f"{repeat}.{index}",
            "seconds": round(value, 4),
            "tokens_per_s": round(batch * (generated if generated > 1 else prompt) / value, 2),
        }
        for name, batch, prompt, generated in cases
        for index, value in enumerate(seconds[name])
    ]


def measure(model: str, side: str, cases: Collection[str]) -> dict[str, list[float]]:
    """Runs in the worker process: seconds of each case, many times after a warm-up."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model,
        quantization="fusedq" if side == "fusedq" else None,
        dtype="bfloat16",
        max_model_len=512,
        enable_prefix_caching=False,
    )
    times: dict[str, list[float]] = {}
    for name, batch, prompt, generated in (case for case in CASES if case[0] in cases):
        prompts = [
            TokensPrompt(prompt_token_ids=[(7 * i + 13 * j) % 500 + 3 for j in range(prompt)])
            for i in range(batch)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True)
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds = times.setdefault(name, [])
        while len(seconds) < MIN_REPEATS or sum(seconds) < MIN_SECONDS:
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
    return times


def print_ratios(rows: list[dict[str, object]], sides: tuple[str, str]) -> None:
    """Of two sides, the second over the first."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for model in dict.fromkeys(row["model"] for row in rows):
        for name in dict.fromkeys(row["case"] for row in rows):
            median = {
                side: statistics.median(
                    float(row["tokens_per_s"])
                    for row in rows
                    if (row["model"], row["case"], row["side"]) == (model, name, side)
                )
                for side in sides
            }
            told = "  ".join(f"{side} {median[side]:9.1f} tok/s" for side in sides)
            ratio = median[sides[1]] / median[sides[0]]
            print(f"{model:28} {name:14} {told}  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
