"""Runs scripts in forks of a process that has imported vLLM: seven seconds of a core saved."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn
from unittest import mock

from local_server import ENVIRONMENT
from spawning import become, fork_when_spawning, leave, status_of

_CONTEXT = multiprocessing.get_context("forkserver")
# What every engine and server of these tests imports of others, and nothing of this project.
_CONTEXT.set_forkserver_preload(
    [
        "vllm.entrypoints.llm",
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        "torch._inductor.compile_fx",
    ]
)


class Forked:
    """A script that runs in a fork: as much of `subprocess.Popen` as its users need."""

    def __init__(
        self,
        script: Path,
        arguments: list[str],
        env: dict[str, str],
        log: Path,
        start_new_session: bool = False,
    ) -> None:
        """Start `python SCRIPT ARGUMENTS` with exactly this environment; it prints to `log`."""
        made = (str(script), arguments, env, str(log), start_new_session)
        self._process = _CONTEXT.Process(target=_main, args=made)
        # Some of these are read when vLLM's libraries are imported.
        with mock.patch.dict(os.environ, ENVIRONMENT):
            forkserver.ensure_running()
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus a signal's number; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return code

    def kill(self) -> None:
        self._process.kill()


def start(command: Sequence[str], log: Path, env: dict[str, str]) -> Forked:
    """Run a Python script with its arguments, in a session of its own."""
    return Forked(Path(command[0]), list(command[1:]), env, log, start_new_session=True)


def run_script(
    script: Path, arguments: list[str], env: dict[str, str], log: Path, timeout: float = 600
) -> int:
    """Run `python SCRIPT ARGUMENTS` with exactly this environment; returns its exit code.

    All that it prints goes to `log`. Raises TimeoutError after `timeout` seconds.
    """
    process = Forked(script, arguments, env, log)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise TimeoutError(
            f"{script.name} {arguments} after {timeout:.0f} s\n{log.read_text()}"
        ) from None


def _main(
    script: str, arguments: list[str], env: dict[str, str], log: str, new_session: bool
) -> NoReturn:
    if new_session:
        os.setsid()
    become(env)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [script, *arguments]
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    # A collection would visit, and so copy, every page that this process shares with the others.
    gc.freeze()
    fork_when_spawning()
    leave(status_of(lambda: runpy.run_path(script, run_name="__main__")))
