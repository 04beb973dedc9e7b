"""Runs a real engine in a process of its own and brings back what it said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from local_server import environment

SCRIPTS = Path(__file__).parent / "scripts"


class EngineFailed(AssertionError):
    """The engine process exited with an error; carries all that it printed."""


def generate(
    folder: Path,
    model: Path,
    prompts: list[list[int]],
    max_tokens: int = 1,
    dump: Path | None = None,
    adapter: Path | None = None,
    env: dict[str, str] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    """Generate greedily with `vllm.LLM(model, **engine)`; one answer per prompt of token ids.

    Each answer holds "tokens", their "logprobs" and "prompt_logprobs" (natural logarithms, first
    one None). With a LoRA `adapter` every prompt is answered without it, then every prompt with it;
    "prompt_logprobs" is None, which vLLM cannot give beside adapters on a CPU.
    """
    request = {
        "engine": {"model": str(model), "max_model_len": 256, **engine},
        "prompts": prompts,
        "max_tokens": max_tokens,
        "dump": str(dump) if dump else None,
        "adapter": str(adapter) if adapter else None,
    }
    return ask("generate.py", folder, request, env)


def ask(script: str, folder: Path, request: dict[str, Any], env: dict[str, str] | None) -> Any:
    """Run one of `scripts/` on a request; returns its answer."""
    request_file, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    request_file.write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), str(request_file), str(answer)],
        env=environment(VLLM_ALLOW_INSECURE_SERIALIZATION="1", **(env or {})),
        capture_output=True,
        text=True,
        timeout=600,
    )
    # vLLM's main process sometimes aborts while it exits ("terminate called without an active
    # exception"), after everything was said; an answer file is written whole or not at all.
    if done.returncode and not answer.exists():
        raise EngineFailed(f"{request['engine']}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
    return json.loads(answer.read_text())


def mean_error(logprobs: list[float | None], expected: list[float | None]) -> float:
    """Mean absolute difference of log-probabilities in nats, without the first token."""
    pairs = list(zip(logprobs, expected, strict=True))[1:]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
