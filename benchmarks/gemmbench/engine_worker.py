"""One vLLM engine: starts it, counts its kernels, times decode and prefill; `engines.py` runs it.

Reads a request (JSON) and writes an answer, so that an engine that dies costs its own run alone.
"""

import fcntl
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM

from vllm_fusedq.integration.rates import decode_rates, prefill_rates


def main(request_file: str, folder: str) -> None:
    request = json.loads(Path(request_file).read_text())
    turn, place = request["turn"], Path(folder)
    start = time.perf_counter()
    llm = LLM(**request["engine"])
    found: dict[str, Any] = {
        "start_s": time.perf_counter() - start,
        "kernels": llm.collective_rpc(count_kernels)[0],
    }
    answer = place / f"{turn['name']}.answer.json"
    write(answer, found)
    with my_turn(place, turn):
        start = time.perf_counter()
        for batch in request["batches"]:
            found[f"decode-{batch}"] = decode_rates(
                llm,
                batch,
                request["prompt_tokens"],
                tuple(request["decode_tokens"]),
                request["repeats"],
            )
            write(answer, found)
        for tokens in request["prefills"]:
            found[f"prefill-{tokens}"] = prefill_rates(llm, tokens, request["repeats"])
            write(answer, found)
        write(answer, found | {"measured_s": time.perf_counter() - start})


def write(path: Path, found: dict[str, Any]) -> None:
    """Replace the answer by a whole one: the engine may be ended at any time."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(found))
    partial.rename(path)


@contextmanager
def my_turn(folder: Path, turn: dict[str, Any]) -> Iterator[None]:
    """Waits until every engine that starts beside this one has started or ended, and until none of
    them measures."""
    (folder / f"{turn['name']}.started.json").touch()
    end = time.monotonic() + turn["wait_s"]
    while time.monotonic() < end and any(
        not (folder / f"{name}.started.json").exists()
        and not (folder / f"{name}.ended.json").exists()
        for name in turn["together"]
    ):
        time.sleep(0.2)
    with (folder / "turn.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def count_kernels(worker: Any) -> dict[str, int]:
    """Runs in the worker: linear layers by the kernel that multiplies by their weight."""
    counts: Counter[str] = Counter()
    for module in worker.model_runner.model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or "Embedding" in type(method).__name__:
            continue
        loaders = getattr(module, "fusedq_loaders", ())
        counts.update(loader.plan.main.call.kernel for loader in loaders)
        if loaders:
            continue
        holder = getattr(module, "scheme", method)
        counts[type(getattr(holder, "kernel", holder)).__name__] += 1
    return dict(counts)


# vLLM spawns worker processes that import this file again.
if __name__ == "__main__":
    main(*sys.argv[1:])
