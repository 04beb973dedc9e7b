"""Starts an engine and times it, in a process of its own (`measure/process.py`).

Answers `rates.json`: seconds since `request["started"]` (epoch) until vLLM was imported, the engine
there and the first token out, the seconds of later first tokens, and decoded tokens per second by
batch; lists are of repeats.
"""

import json
import time
from pathlib import Path
from typing import Any

from vllm import LLM

from vllm_fusedq.integration.devices import announced_device
from vllm_fusedq.integration.rates import decode_rates, generate_seconds, prompt
from vllm_fusedq.measure.process import OnReport, answer

_IMPORTED = time.time()


def main(request: dict[str, Any], folder: Path, report: OnReport) -> None:
    """`request`: "engine" (LLM's arguments), "started", "batches", "prompt_tokens",
    "decode_tokens", "repeats"."""
    announced_device()
    started, length = request["started"], request["prompt_tokens"]
    report({"stage": "starting"})
    llm = LLM(**request["engine"], skip_tokenizer_init=True, enable_prefix_caching=False)
    ready = time.time()
    generate_seconds(llm, [prompt(length, 0)], 1)
    found = {
        "imported": _IMPORTED - started,
        "ready": ready - started,
        "first_token": time.time() - started,
        "later_first_tokens": [
            generate_seconds(llm, [prompt(length, seed)], 1)
            for seed in range(1, request["repeats"] + 1)
        ],
        "decode": {},
    }
    for batch in request["batches"]:
        report({"batch": batch})
        decode = tuple(request["decode_tokens"])
        found["decode"][batch] = decode_rates(llm, batch, length, decode, request["repeats"])
    (folder / "rates.json").write_text(json.dumps(found))


if __name__ == "__main__":
    answer(main)
