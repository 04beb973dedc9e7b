"""Work that needs an engine runs in a process of its own: when that ends, its memory is free.

The process gets a request as JSON, reports lines of JSON through a pipe, and leaves its answer in a
folder that is given to it. All that vLLM prints goes to a log, kept where something failed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_fusedq import errors
from vllm_fusedq.errors import EngineError

OnReport = Callable[[dict[str, Any]], None]
REQUEST = "request.json"
# Seconds that vLLM may take to end its own workers
_PATIENCE = 10
_NO_MEMORY = ("out of memory", "kv cache", "free memory", "available memory")


def run_apart(
    module: str,
    what: str,
    request: dict[str, Any],
    folder: Path,
    on_report: OnReport,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run `python -m MODULE` on a request and wait; its whole process group ends with this call.

    Args:
        module: has `main(request, folder, report)` and calls `answer(main)`.
        what: what an error calls the work: the model, and how it is served.
        folder: where the process leaves its answer.
        on_report: gets what the process reports.
        env: added to its environment.

    Returns:
        All that it printed.

    Raises:
        EngineError: the process ended without having finished.
    """
    (folder / REQUEST).write_text(json.dumps(request))
    descriptor, log = tempfile.mkstemp(prefix="fusedq-engine-", suffix=".log")
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            pass_fds=(writing,),
            start_new_session=True,
            env=_environment() | dict(env or {}),
        )
    finally:
        os.close(writing)
        os.close(descriptor)
    try:
        last = _watched(process, reading, on_report)
    except BaseException:
        Path(log).unlink(missing_ok=True)
        raise
    if "done" in last:
        printed = Path(log).read_text(errors="replace")
        Path(log).unlink()
        return printed
    raise EngineError(f"{what}: {_reason(last, process.returncode)}; all that it printed: {log}")


def _watched(process: subprocess.Popen[bytes], reading: int, on_report: OnReport) -> dict[str, Any]:
    """The last report of a process, which has ended then."""
    last: dict[str, Any] = {}
    with _ended(process), os.fdopen(reading, encoding="utf-8") as pipe:
        for line in pipe:
            last = json.loads(line)
            if last.keys() & {"done", "error"}:
                break
            on_report(last)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    return last


def answer(main: Callable[[dict[str, Any], Path, OnReport], None]) -> None:
    """The other end of `run_apart`: run `main`, and say how it ended."""
    folder, writing = Path(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:

        def report(content: dict[str, Any]) -> None:
            print(json.dumps(content), file=pipe, flush=True)

        try:
            main(json.loads((folder / REQUEST).read_text()), folder, report)
        except Exception as error:
            report({"error": str(error), "type": type(error).__name__})
            raise
        report({"done": True})


def _environment() -> dict[str, str]:
    """Little memory for a CPU's cache, unless told, and an engine whose errors keep their types."""
    given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    return {**given, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONUNBUFFERED": "1"}


def _reason(last: dict[str, Any], code: int | None) -> str:
    if "error" not in last:
        if code is not None and code < 0:
            return (
                f"its process was killed by {signal.Signals(-code).name}, as a machine without "
                "memory does; name a smaller model, or more ranks (-tp)"
            )
        return f"its process ended with exit code {code}"
    message = str(last["error"]).strip() or last["type"]
    if issubclass(getattr(errors, last["type"], Exception), errors.FusedQError):
        return message
    lines = message.splitlines()
    if last["type"] == "OutOfMemoryError" or any(sign in message.lower() for sign in _NO_MEMORY):
        return (
            f"does not fit the device's memory: {lines[0]}; lower --max-length, raise -tp, or "
            "change --gpu-memory-utilization"
        )
    return f"{last['type']}: {lines[0]}"


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the process and all that it started, also where this process is told to end."""
    with _interrupting(signal.SIGTERM, signal.SIGHUP):
        try:
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    # A finished engine needs no time to say goodbye; vLLM's workers are in the same group
    for number, patience in ((signal.SIGINT, _PATIENCE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


@contextmanager
def _interrupting(*signals: signal.Signals) -> Iterator[None]:
    """Have these signals do what Ctrl-C does, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
