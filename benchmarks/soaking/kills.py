"""Servers that are killed at random moments, what they leave, and whether the next one starts."""

import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from local_server import Server, stop
from soaking.processes import Watch, descendants, family

GONE_SECONDS = 60.0
"""What the processes of a server that was killed may take to end."""
COMPILER_SECONDS = 600.0
"""What a compiler may take to: it is not told that nobody waits for it, and ends by itself."""
# torch's, which the next start finds
_CACHE = "torchinductor_"
# Shared memory and sockets of vLLM's own, which it leaves with this plugin and without
_OF_VLLM = re.compile(r"vllm_dist_.+|psm_\w+|sem\.mp-\w+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The server starts the engine, the engine starts the workers
_GENERATIONS = {"engine": 1, "worker": 2}


@dataclass(frozen=True, slots=True)
class Kill:
    """`signal` to a `target`: "group" (as Ctrl-C does), "server" (its first process), "engine" or
    "worker" alone; while the server is "compiling" cpu-fused, "loading" or "serving"."""

    moment: str
    target: str
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.signal.name} to the {self.target} while {self.moment}"


_STRIKES = (
    ("group", signal.SIGINT),
    ("server", signal.SIGTERM),
    ("server", signal.SIGKILL),
    ("engine", signal.SIGKILL),
    ("worker", signal.SIGKILL),
)


def kills(seed: int, count: int, compiling: bool) -> list[Kill]:
    """Each strike while loading and while serving, in turn, in random order; before them one while
    the first start compiles, if it does."""
    rng = random.Random(seed)
    loading = [Kill("loading", *each) for each in rng.sample(_STRIKES, len(_STRIKES))]
    serving = [Kill("serving", *each) for each in rng.sample(_STRIKES, len(_STRIKES))]
    first = [Kill("compiling", "worker", signal.SIGKILL)] * compiling
    return first + [each for pair in zip(loading, serving, strict=True) for each in pair][:count]


@dataclass(slots=True)
class Left:
    """What a server that was killed left behind; `by_vllm` is what vLLM leaves by itself too."""

    processes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    by_vllm: list[str] = field(default_factory=list)
    port_taken: bool = False
    seconds: float = 0.0

    def file(self, path: Path) -> list[str]:
        """The list that a file belongs to."""
        return self.by_vllm if _OF_VLLM.fullmatch(path.name) else self.files

    @property
    def problems(self) -> list[str]:
        found = [f"process {each} is left" for each in self.processes]
        found += [f"{each} is left" for each in self.files]
        return found + ["its port is taken"] * self.port_taken

    def document(self) -> dict[str, Any]:
        return asdict(self)


def strike(server: Server, kill: Kill, patience: float = 120) -> None:
    """Send the signal, as soon as there is the process that it is for.

    Raises:
        TimeoutError: there is none.
    """
    if kill.target == "group":
        os.killpg(server.process.pid, kill.signal)
    elif kill.target == "server":
        os.kill(server.process.pid, kill.signal)
    else:
        target = server.process.pid, _GENERATIONS[kill.target]
        wait_for(lambda: any(_sent(each, kill.signal) for each in descendants(*target)), patience)


def _sent(process: psutil.Process, number: signal.Signals) -> bool:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
        return True
    return False


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {seconds:.0f} s")
        time.sleep(0.05)


def left_behind(
    server: Server, watch: Watch, folders: list[Path], seconds: float = GONE_SECONDS
) -> Left:
    """Wait for a killed server's processes to end; what remains of it, which is then removed.

    Args:
        watch: has looked at the server since it began.
        folders: were empty when it began, and are to be so now.
        seconds: that its processes may take to end.
    """
    session, start = server.process.pid, time.monotonic()
    with suppress(TimeoutError):
        wait_for(lambda: server.process.poll() is not None and not family(session), seconds)
    left = Left(seconds=round(time.monotonic() - start, 1))
    for process in family(session):
        with suppress(psutil.NoSuchProcess):
            left.processes.append(f"{process.pid} {process.name()}")
    stop(server.process)
    watch.stop()
    for path in sorted(watch.shared_memory):
        if path.exists():
            left.file(path).append(str(path))
            path.unlink(missing_ok=True)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(_CACHE):
                continue
            left.file(path).append(f"{folder.name}/{path.name}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    left.port_taken = _is_taken(int(server.url.rpartition(":")[2]))
    return left


def _is_taken(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
