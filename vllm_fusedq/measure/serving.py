"""The real engine, by fusedq and by stock vLLM on the same files: rates, and the start by parts."""

import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_fusedq.errors import EngineError
from vllm_fusedq.measure.process import run_apart

SERVING = "vllm_fusedq.integration.serving"
BATCHES = (1, 8, 32)
PROMPT_TOKENS, DECODE_TOKENS, REPEATS = 16, (8, 40), 3
MAX_MODEL_LEN = 64
WAYS = {"fusedq": "fusedq", "stock vLLM": None}
# An engine's log, by the metric it gives: seconds, except for the memory. Repacking and warm-up
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
# On a CPU the log has no duration of compiling, but the time of day around it
_CPU_COMPILES = tuple(
    re.compile(rf" (\d\d):(\d\d):(\d\d) \[[^]]*\] Warming up {what}")
    for what in (r"model for the compilation", r"done\.")
)
_DAY = 24 * 3600
# What of the log is shown, and under which name
_PARTS = {
    "load_read_s": "reading and loading weights, s",
    "repack_s": "  of it repacking, s",
    "warm_up_s": "  of it warm-up of kernels, s",
    "init_engine_s": "profiling, KV cache, compiling, warm-up of the engine, s",
    "compile_s": "  of it torch.compile, s",
    "cpu_compile_s": "  of it compiling for a CPU and the first run, s (whole ones)",
    "graph_capture_s": "  of it graph capture, s",
}


@dataclass(frozen=True)
class Served:
    """One side: `values` by what they are of; `failed` says why there are none."""

    way: str
    values: dict[str, float]
    failed: str = ""


def serve(
    model: str,
    dtype: str,
    revision: str | None,
    settings: Mapping[str, str],
    batches: Sequence[int],
    on_progress: Callable[[str], None],
) -> list[Served]:
    """Each of `WAYS` in a process of its own, compiled caches empty, where it can serve the model.

    Raises:
        EngineError: fusedq cannot.
    """
    found = []
    for way, quantization in WAYS.items():
        on_progress(way)
        try:
            found.append(_served(model, dtype, revision, settings, batches, way, quantization))
        except EngineError as error:
            if quantization is not None:
                raise
            found.append(Served(way, {}, str(error)))
    return found


def log_metrics(log: str) -> dict[str, float]:
    """What vLLM's log tells, by the names of `LOG`; sums where it tells it several times."""
    found = {name: re.findall(pattern, log) for name, pattern in LOG.items()}
    told = {name: sum(map(float, values)) for name, values in found.items() if values}
    begin, end = (pattern.search(log) for pattern in _CPU_COMPILES)
    if begin and end:
        told["cpu_compile_s"] = float((_of_day(end) - _of_day(begin)) % _DAY)
    return told


def _of_day(match: re.Match[str]) -> int:
    hours, minutes, seconds = map(int, match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _served(
    model: str,
    dtype: str,
    revision: str | None,
    settings: Mapping[str, str],
    batches: Sequence[int],
    way: str,
    quantization: str | None,
) -> Served:
    engine: dict[str, Any] = {"model": model, "dtype": dtype, "max_model_len": MAX_MODEL_LEN}
    engine |= {"quantization": quantization, "max_num_seqs": max(batches)}
    if quantization:
        engine["additional_config"] = {"fusedq": dict(settings)}
    # On a CPU torch.compile calls g++
    engine["enforce_eager"] = not (shutil.which("nvidia-smi") or shutil.which("g++"))
    if revision:
        engine["revision"] = revision
    with tempfile.TemporaryDirectory(prefix="fusedq-bench-") as folder:
        request = {
            "engine": engine,
            "started": time.time(),
            "batches": list(batches),
            "prompt_tokens": PROMPT_TOKENS,
            "decode_tokens": DECODE_TOKENS,
            "repeats": REPEATS,
        }
        caches = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        env = {name: str(Path(folder) / name.lower()) for name in caches}
        # As `vllm serve` has it: scheduling and answering overlap
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        log = run_apart(SERVING, f"{model} ({way})", request, Path(folder), lambda said: None, env)
        rates = json.loads((Path(folder) / "rates.json").read_text())
    return Served(way, _values(rates, log_metrics(log)))


def _values(rates: dict[str, Any], logged: dict[str, float]) -> dict[str, float]:
    values = {
        "process start to first token, s": rates["first_token"],
        "  importing vLLM, s": rates["imported"],
        "  building the engine, s": rates["ready"] - rates["imported"],
    }
    values |= {f"    {told}": logged[name] for name, told in _PARTS.items() if name in logged}
    values["  first token of the first request, s"] = rates["first_token"] - rates["ready"]
    values["time to first token when warm, ms"] = 1e3 * statistics.median(
        rates["later_first_tokens"]
    )
    for batch, repeats in rates["decode"].items():
        values[f"decode, batch {batch}, tokens/s"] = statistics.median(repeats)
    return values
