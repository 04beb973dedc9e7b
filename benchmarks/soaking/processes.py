"""The processes of a server and what they hold open, as Linux tells it."""

import os
import re
import threading
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
_MAPPED = re.compile(rf" ({SHARED_MEMORY}/.+)$", re.MULTILINE)
_DELETED = " (deleted)"


def family(session: int) -> list[psutil.Process]:
    """A server's living processes: those of the session that `local_server.start` gave it."""
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == session:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def descendants(session: int, generation: int) -> list[psutil.Process]:
    """vLLM's processes that a server's first one started, or those that these started.

    They are known by their titles and, before they have one, as Python's spawned processes.
    """
    found = [psutil.Process(session)] if psutil.pid_exists(session) else []
    for _ in range(generation):
        children = []
        for parent in found:
            with suppress(psutil.NoSuchProcess):
                children += [each for each in parent.children() if _is_of_vllm(each)]
        found = children
    return found


def _is_of_vllm(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any("spawn_main" in x or x.startswith("VLLM::") for x in process.cmdline())
    return False


def resident_bytes(session: int) -> int:
    """RSS of all of a server's processes; what they share counts once for each."""
    total = 0
    for process in family(session):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def shared_memory(session: int) -> set[Path]:
    """Files of /dev/shm that a server's processes have mapped or open right now."""
    found: set[str] = set()
    for process in family(session):
        folder = Path("/proc", str(process.pid))
        with suppress(OSError):
            found.update(_MAPPED.findall((folder / "maps").read_text()))
        with suppress(OSError):
            for descriptor in (folder / "fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(descriptor))
    own = f"{SHARED_MEMORY}/"
    return {Path(x) for x in found if x.startswith(own) and not x.endswith(_DELETED)}


class Watch(threading.Thread):
    """Takes note of all shared memory that a server's processes ever held, until it is stopped."""

    def __init__(self, session: int, every: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.shared_memory: set[Path] = set()
        self._session, self._every = session, every
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._every):
            self.shared_memory |= shared_memory(self._session)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
