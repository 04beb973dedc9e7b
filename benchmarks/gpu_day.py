"""Everything that waits for a GPU, in order, in pieces that end within ten minutes.

    python benchmarks/gpu_day.py                      # the steps and their commands
    python benchmarks/gpu_day.py sane bits right      # some of them, one after the other
    python benchmarks/gpu_day.py tune --keep FOLDER   # and copy results and tuned rows there
    python benchmarks/gpu_day.py right --dry-run      # no GPU: the same commands, tiny, on a CPU

The steps share `--seconds`; a command that is not done by then stops by itself, and the same line
goes on where it stopped, from the result files. A command that fails does not keep the next from
running; the exit status is 1 then. Nothing needs a network.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from fusedq_kernels.choose import tuning

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
# What a command may take beyond its own limit: the compilation or engine that it is in.
GRACE_SECONDS = 30
# Where they lie in the repository, and where this run writes them: rows go to the package that is
# imported, which may be installed elsewhere.
KEPT = {
    "benchmarks/results": ROOT / "benchmarks" / "results",
    "kernels/fusedq_kernels/tuned": tuning.FOLDER,
}
_SANITIZE = "compute-sanitizer --error-exitcode 9 --tool"
_TINY = "kernels_correct.py --tiny"
_TUNED = "--shapes llama-3-8b --shapes qwen2.5-7b --shapes qwen2.5-32b"
_COMPARED = (
    "--shapes llama-3-8b --shapes llama-3-70b --shapes qwen2.5-7b --shapes qwen2.5-72b "
    "--shapes tiny-gemm --shapes published"
)
_TYPES = "--weight-type uint4 --weight-type uint8b128 --weight-type nf4"
# Scripts without --seconds and --dry-run; modules (-m) have neither.
_UNLIMITED = ("plots.py", "random_checkpoint.py")
_WORK = Path(tempfile.gettempdir()) / "fusedq-gpu-day"

app = typer.Typer(add_completion=False)


class Command(NamedTuple):
    """A script of this folder or a module (-m), with arguments; `under` is a tool that runs it.

    `{work}` stands for the folder of the checkpoints.
    """

    arguments: str
    under: str = ""

    def __str__(self) -> str:
        where = "" if self.arguments.startswith("-m") else "benchmarks/"
        return f"{self.under} python {where}{self.arguments}".lstrip()


class Step(NamedTuple):
    """What it settles, and its commands."""

    purpose: str
    commands: tuple[Command, ...]


STEPS: dict[str, Step] = {
    "predict": Step("the roofline, before anything", (Command("bench_gemm.py --roofline"),)),
    "sane": Step(
        "no access out of bounds, no race, nothing read before it is written",
        (
            Command(f"{_TINY} --weight-type uint4b8", f"{_SANITIZE} memcheck"),
            Command(f"{_TINY} --weight-type uint4b8", f"{_SANITIZE} racecheck"),
            Command(f"{_TINY} --weight-type uint4b8", f"{_SANITIZE} initcheck"),
            Command(_TINY, f"{_SANITIZE} memcheck"),
        ),
    ),
    "bits": Step("bit-equality of tiles, accumulation", (Command("experiments.py 3 5"),)),
    "right": Step("every kernel against float64", (Command("kernels_correct.py --jobs 8"),)),
    "bound": Step("what limits decoding", (Command("experiments.py 1"),)),
    "tail": Step("split-K", (Command("experiments.py 4 10"),)),
    "prefill": Step("prefill tiles, exact prefill", (Command("experiments.py 2 7 9"),)),
    "types": Step("NF4, 8 bits, fp16, zero points", (Command("experiments.py 6 8"),)),
    "tune": Step("rows for what is served most", (Command(f"tune.py {_TUNED}"),)),
    "tune-types": Step(
        "rows for other weight types", (Command(f"tune.py --shapes llama-3-8b {_TYPES}"),)
    ),
    "compare": Step("int4 beside everything else", (Command(f"bench_gemm.py {_COMPARED}"),)),
    "compare-types": Step(
        "the other weight types and fp16 beside everything else",
        (
            Command(f"bench_gemm.py {_TYPES}"),
            Command("bench_gemm.py --weight-type uint8b128 --group-size -1"),
            Command("bench_gemm.py --act-dtype float16"),
        ),
    ),
    "light": Step(
        "real checkpoints in real vLLM answer as their producing libraries",
        (
            Command("-m pytest -q tests/engine/test_server.py -k producing_library"),
            Command("-m pytest -q tests/engine/test_mixed_widths.py"),
        ),
    ),
    "honest": Step(
        "which kernels the profiler sees in vLLM, and what they allocate",
        (
            Command("-m vllm_fusedq.cli verify tests/assets/tiny-llama-awq-g128"),
            Command("random_checkpoint.py llama-3-8b gptq {work}/llama-3-8b-gptq"),
            Command("-m vllm_fusedq.cli verify {work}/llama-3-8b-gptq"),
        ),
    ),
    "serve": Step(
        "inside vLLM, four sides", (Command("serve_compare.py --work {work} --model llama-3-8b"),)
    ),
    "serve-more": Step(
        "larger models, other layouts",
        (
            Command("serve_compare.py --work {work} --model qwen2.5-7b --model qwen2.5-32b"),
            Command(
                "serve_compare.py --work {work} --model llama-3-8b --layout awq "
                "--layout compressed-tensors"
            ),
        ),
    ),
    "plots": Step("the figures", (Command("plots.py benchmarks/results/h200"),)),
}


@app.command(help=__doc__)
def main(
    step: Annotated[list[str] | None, typer.Argument(help=", ".join(STEPS))] = None,
    seconds: Annotated[float, typer.Option(help="for all steps together")] = 540,
    work: Annotated[Path, typer.Option(help="folder for checkpoints")] = _WORK,
    keep: Annotated[Path | None, typer.Option(help="folder to copy results to")] = None,
    dry_run: Annotated[bool, typer.Option(help="tiny, on a CPU")] = False,
) -> None:
    start = time.monotonic()
    unknown = [name for name in step or () if name not in STEPS]
    if unknown:
        raise typer.BadParameter(f"unknown steps {unknown}; known: {', '.join(STEPS)}")
    if not step:
        for name, each in STEPS.items():
            print(f"{name}: {each.purpose}")
            for command in each.commands:
                print(f"    {command}")
        return
    failed = []
    for name in step:
        for command in STEPS[name].commands:
            left = seconds - (time.monotonic() - start)
            if left <= 0:
                failed.append(f"{name}: no time left for {command.arguments}: run it again")
                continue
            if problem := run(command, left, dry_run, work):
                failed.append(f"{name}: {problem}")
    if keep is not None:
        for name, folder in KEPT.items():
            if folder.exists():
                shutil.copytree(folder, keep / name, dirs_exist_ok=True)
    for line in failed:
        print(line, file=sys.stderr)
    raise typer.Exit(bool(failed))


def run(command: Command, seconds: float, dry_run: bool, work: Path = _WORK) -> str | None:
    """One command within its time; what went wrong, or None."""
    line = full_command(command, seconds, dry_run, work)
    print(f"--- {' '.join(line)}", flush=True)
    # The sanitizer sees an allocation's border only where nothing caches allocations.
    env = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command.under else {})
    limit = seconds + GRACE_SECONDS
    try:
        # A session of its own: its workers end with it.
        process = subprocess.Popen(line, cwd=ROOT, env=env, start_new_session=True)
        status = process.wait(limit)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"{command.arguments} was stopped after {limit:.0f} s: run it again"
    return f"{command.arguments}: exit status {status}" if status else None


def full_command(command: Command, seconds: float, dry_run: bool, work: Path = _WORK) -> list[str]:
    """What is executed; a dry run leaves out the tool and the GPU."""
    script, *arguments = command.arguments.format(work=work).split()
    if script == "-m":
        return [sys.executable, script, *arguments]
    line = [sys.executable, str(BENCHMARKS / script), *arguments]
    if script in _UNLIMITED:
        return line
    line += ["--seconds", f"{seconds:.0f}"]
    if dry_run:
        return [*line, "--dry-run"]
    return [*command.under.split(), *line]


if __name__ == "__main__":
    app()
