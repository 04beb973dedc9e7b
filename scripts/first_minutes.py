"""Writes the outputs in docs/first-minutes.md: each command there, run on a model's real sizes.

    python scripts/first_minutes.py [--check]

A block that starts with `$ fusedq check` is written anew. Nothing is downloaded: the headers are
made from the published sizes of the model, as the tests of serving_configs/ make them. `--check`
writes nothing and fails where the page is not up to date.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "first-minutes.md"
# Repositories of the page: the model's sizes and what its files hold.
REPOSITORIES = {
    "Qwen/Qwen3-8B-AWQ": ("Qwen3-8B", "awq"),
    "Qwen/Qwen2-72B-Instruct-GPTQ-Int4": ("Qwen2-72B", "gptq"),
    "RedHatAI/Llama-3.3-70B-Instruct-quantized.w4a16": ("Llama-3.3-70B", "compressed-tensors"),
}
BLOCK = re.compile(r"(?<=\n```\n)\$ (fusedq .*)\n(?:.*\n)*?(?=```\n)")


def rewritten(text: str) -> str:
    """`text` with the outputs of its commands."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]
    from published import MODELS, write_headers

    with tempfile.TemporaryDirectory() as folder:
        for name, (model, fmt) in REPOSITORIES.items():
            write_headers(Path(folder) / name, MODELS[model], fmt)
        before = Path.cwd()
        os.chdir(folder)
        try:
            return BLOCK.sub(lambda found: _run(found[1]), text)
        finally:
            os.chdir(before)


def _run(command: str) -> str:
    from vllm_fusedq.cli import app

    result = CliRunner().invoke(app, command.split()[1:])
    lines = [line.rstrip() for line in result.output.splitlines()]
    return "\n".join([f"$ {command}", *lines, f"$ echo $?\n{result.exit_code}"]) + "\n"


def main() -> None:
    text = PAGE.read_text()
    written = rewritten(text)
    if "--check" in sys.argv[1:]:
        if written != text:
            sys.exit("docs/first-minutes.md is not up to date: run python scripts/first_minutes.py")
        return
    PAGE.write_text(written)


if __name__ == "__main__":
    main()
