"""`make demo`: serve a real quantized checkpoint, ask it, run batches; print answers and plan.

Everything is the real thing: `vllm serve` with its OpenAI-compatible API, the `openai` client,
`vllm run-batch`, and `vllm.LLM`. The model is tiny and writes Python-like text.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

from local_server import VLLM, ServerDied, compile_arguments, environment, serving

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = ROOT / "tests" / "assets" / "tiny-llama-awq-g128"
SERVE_ARGUMENTS = ("--quantization", "fusedq", "--served-model-name", "tiny", "--max-model-len")
MAX_MODEL_LEN = "256"
SAMPLING = {"max_tokens": 32, "temperature": 0.6, "top_p": 0.9, "seed": 3}
LOG_PREFIX = re.compile(r"^(\(\w+[^)]*\) )*(INFO|WARNING|ERROR) \S+ \S+ \[[^\]]*\] ?", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT_MODEL)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        try:
            ask_server(model, Path(folder))
        except ServerDied as error:
            print(f"the server did not start:\n{error}", file=sys.stderr)
            return 1
        run_batch(model, Path(folder))
        run_offline(model)
    print("\ndemo: done")
    return 0


def ask_server(model: Path, folder: Path) -> None:
    arguments = [*SERVE_ARGUMENTS, MAX_MODEL_LEN, *compile_arguments()]
    title(f"vllm serve {model.name} {' '.join(arguments)}")
    started = time.monotonic()
    with serving(model, folder / "server.log", arguments) as server:
        print(f"ready after {time.monotonic() - started:.0f} s at {server.url}\n")
        print(kernel_plan(server.log))
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        title("completion")
        prompt = "def __init__(self, "
        answer = client.completions.create(model="tiny", prompt=prompt, **SAMPLING)
        print(prompt + answer.choices[0].text)

        title("chat")
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "import sys"}],
            **SAMPLING,
        )
        print(chat.choices[0].message.content)

        title("streaming")
        print("for ", end="")
        stream = client.completions.create(model="tiny", prompt="for ", stream=True, **SAMPLING)
        for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)
        print()


def kernel_plan(log: str) -> str:
    """The plan that the engine logged, without vLLM's line prefixes."""
    text = LOG_PREFIX.sub("", re.sub(r"^\([^)]*\) ", "", log, flags=re.MULTILINE))
    start = text.index("fusedq kernel plan")
    return text[start : text.index("fallbacks: ", start)] + "fallbacks: 0"


def run_batch(model: Path, folder: Path) -> None:
    title("vllm run-batch on examples/batch.jsonl")
    results = folder / "results.jsonl"
    command = [*VLLM, "run-batch", "-i", str(ROOT / "examples" / "batch.jsonl"), "-o", str(results)]
    command += ["--model", str(model), *SERVE_ARGUMENTS, MAX_MODEL_LEN, "--enforce-eager"]
    run(command)
    for line in results.read_text().splitlines():
        result = json.loads(line)
        text = result["response"]["body"]["choices"][0]["message"]["content"]
        print(f"{result['custom_id']}: {text!r}")


def run_offline(model: Path) -> None:
    title("examples/offline_batch.py")
    print(run([sys.executable, str(ROOT / "examples" / "offline_batch.py"), str(model)]), end="")


def run(command: list[str]) -> str:
    """Run a command quietly; its standard output without vLLM's log lines."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    # vLLM's main process sometimes aborts while it exits, after everything was printed.
    if done.returncode not in (0, -signal.SIGABRT):
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if " -> " in line)


def title(text: str) -> None:
    print(f"\n--- {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
