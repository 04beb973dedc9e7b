"""Runs scripts in forks of a process that has imported vLLM, which takes ten seconds of a core."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vllm.entrypoints.llm"])


def run_script(
    script: Path, arguments: list[str], env: dict[str, str], log: Path, timeout: float = 600
) -> int:
    """Run `python SCRIPT ARGUMENTS` with exactly this environment; returns its exit code.

    All that it prints goes to `log`. Raises TimeoutError after `timeout` seconds.
    """
    process = _CONTEXT.Process(target=_main, args=(str(script), arguments, env, str(log)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{script.name} {arguments} after {timeout:.0f} s\n{log.read_text()}")
    return process.exitcode


def _main(script: str, arguments: list[str], env: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
