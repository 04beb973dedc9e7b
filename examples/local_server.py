"""Starts and stops a real `vllm serve` on a loopback port; used by the demo and the tests."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# Small models on a machine without a GPU: 1 GiB of KV cache, nothing sent anywhere.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
_SCRIPT = Path(sys.executable).with_name("vllm")
# An installation into a folder of its own has no script beside Python.
VLLM = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def compile_arguments() -> list[str]:
    """What to add where torch.compile cannot work: on a CPU it calls g++."""
    has_gpu = shutil.which("nvidia-smi") is not None
    return [] if has_gpu or shutil.which("g++") else ["--enforce-eager"]


class ServerDied(RuntimeError):
    """`vllm serve` exited before it answered."""


class Process(Protocol):
    """What is asked of a server's process."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(frozen=True)
class Server:
    """A running server: its base URL and everything it has printed so far."""

    url: str
    log_file: Path
    process: Process

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, plus what a CPU run of vLLM needs."""
    return {**os.environ, **ENVIRONMENT, **extra}


def free_port() -> int:
    """A loopback port that nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(command: Sequence[str], log_file: Path, env: dict[str, str]) -> Process:
    """Run a command that prints to `log_file`, in a session of its own."""
    with log_file.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


Start = Callable[[Sequence[str], Path, dict[str, str]], Process]


def launch(
    model: Path,
    log_file: Path,
    arguments: Sequence[str] = (),
    port: int | None = None,
    start: Start = start,
    **env: str,
) -> Server:
    """Start `vllm serve MODEL ARGUMENTS`, on a free port unless told, and do not wait for it.

    The server gets a process group of its own, so that its workers stop with it.
    """
    port = port or free_port()
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    process = start(command, log_file, environment(**env))
    return Server(f"http://127.0.0.1:{port}", log_file, process)


@contextmanager
def serving(
    model: Path,
    log_file: Path,
    arguments: Sequence[str] = (),
    timeout: float = 300,
    start: Start = start,
    **env: str,
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGUMENTS` until the block ends.

    Raises:
        ServerDied: it cannot start.
    """
    server = launch(model, log_file, arguments, start=start, **env)
    try:
        wait_until_healthy(server, timeout)
        yield server
    finally:
        stop(server.process)


def stop(process: Process) -> None:
    """Ctrl-C for the server's whole process group; SIGKILL for what is left after 30 seconds."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_healthy(server: Server, timeout: float = 300) -> None:
    """Raises ServerDied if it exits before it answers, or does not answer in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerDied(server.log)
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise ServerDied(f"not healthy after {timeout:.0f} s\n{server.log}")
