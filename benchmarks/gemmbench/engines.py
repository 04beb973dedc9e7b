"""Starts vLLM engines, each a process of its own, and reads what they measured and logged.

Engines that run together start side by side and measure one after the other: none begins before
all have started, or died, and one at a time holds the lock. Times of starting are then those of
starting together.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemmbench.results import Row
from vllm_fusedq.measure.serving import log_metrics

WORKER = Path(__file__).parent / "engine_worker.py"
_POLL_SECONDS = 0.2
_LOG_END = 6000


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
_SIZES = {"max_model_len": 8448, "max_num_batched_tokens": 8192, "max_num_seqs": 256}
FULL = {
    "engine": {**_SIZES, "gpu_memory_utilization": 0.85},
    **{"batches": [1, 8, 16, 32, 64, 128, 256], "prefills": [512, 1024, 2048, 4096, 8192]},
    **{"prompt_tokens": 16, "decode_tokens": [16, 144], "repeats": 5},
}
# Engines that share a GPU each say what their cache takes: none may ask how much is left. 6 GiB
# hold 256 sequences of 128 tokens of an 8B model.
TOGETHER = {
    "engine": {**_SIZES, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 6 << 30},
    **{"batches": FULL["batches"], "prefills": [512, 2048, 8192]},
    **{"prompt_tokens": 16, "decode_tokens": [16, 112], "repeats": 3},
}
DRY = {
    "engine": {"max_model_len": 64, "enforce_eager": True, "max_num_seqs": 4},
    **{"batches": [1, 2], "prefills": [16]},
    **{"prompt_tokens": 4, "decode_tokens": [2, 6], "repeats": 2},
}


class EngineDied(Exception):
    """An engine ended without an answer; the message holds the end of its log."""


class Start(NamedTuple):
    """One engine to be started: its model, how, and where its output goes."""

    checkpoint: Path
    side: Side
    log: Path


def run_engines(
    starts: Mapping[str, Start], settings: Mapping[str, Any], on_cpu: bool, seconds: float
) -> dict[str, list[Row] | EngineDied]:
    """Rows of each engine by its name, or why there are none. What is not done within `seconds` is
    ended, with the rows that it had."""
    end = time.monotonic() + seconds
    folder = next(iter(starts.values())).log.parent
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier run left would open the turn too soon.
    for old in (file for name in starts for file in folder.glob(f"{name}.*.json")):
        old.unlink()
    processes = {}
    try:
        for name, start in starts.items():
            processes[name] = _started(name, start, settings, on_cpu, list(starts), seconds)
        while any(each.poll() is None for each in processes.values()) and time.monotonic() < end:
            for name, each in processes.items():
                if each.poll() is not None:
                    (folder / f"{name}.ended.json").touch()
            time.sleep(_POLL_SECONDS)
    finally:
        for each in processes.values():
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()
    return {name: _rows_of(name, start.log) for name, start in starts.items()}


def _started(
    name: str,
    start: Start,
    settings: Mapping[str, Any],
    on_cpu: bool,
    together: list[str],
    seconds: float,
) -> subprocess.Popen[bytes]:
    side, folder = start.side, start.log.parent
    engine = {
        "model": str(start.checkpoint),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "load_format": "auto" if side.quantized else "dummy",
        **settings["engine"],
    }
    if side.quantization:
        engine["quantization"] = side.quantization
    env = {
        **os.environ,
        **{"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"},
        **{"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"},
        # Engines that start together do not compile into one folder.
        **{"VLLM_CACHE_ROOT": str(start.checkpoint.parent / f"vllm-cache-{name}")},
        **side.env,
    }
    if on_cpu:
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0"}
        env.pop("TRITON_INTERPRET", None)
    asked = folder / f"{name}.request.json"
    turn = {"name": name, "together": together, "wait_s": seconds}
    asked.write_text(json.dumps({**settings, "engine": engine, "turn": turn}))
    return run_worker([str(WORKER), str(asked), str(folder)], start.log, env)


def run_worker(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a Python script that prints to `log`, in a session of its own."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _rows_of(name: str, log: Path) -> list[Row] | EngineDied:
    answer, text = log.parent / f"{name}.answer.json", log.read_text(errors="replace")
    if not answer.exists():
        return EngineDied(f"the engine died; the end of {log}:\n{text[-_LOG_END:]}")
    return metrics(json.loads(answer.read_text()), text)


def metrics(answer: dict[str, Any], log: str) -> list[Row]:
    """Rows from an engine's answer (medians and half the range) and from vLLM's log."""
    kernels = " ".join(f"{name}:{count}" for name, count in sorted(answer["kernels"].items()))
    rows: list[Row] = [{"metric": "start_s", "value": round(answer["start_s"], 2)}]
    # The last that an engine writes: without it the engine was ended before.
    if "measured_s" in answer:
        rows.append({"metric": "measured_s", "value": round(answer["measured_s"], 2)})
    for name, value in log_metrics(log).items():
        rows.append({"metric": name, "value": round(value, 3)})
    for name, values in answer.items():
        if name.startswith(("decode-", "prefill-")):
            spread = (max(values) - min(values)) / 2
            value = round(statistics.median(values), 2)
            rows.append({"metric": f"{name}_tok_s", "value": value, "spread": round(spread, 2)})
    return [{**row, "kernels": kernels} for row in rows]
