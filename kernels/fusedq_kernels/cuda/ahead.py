"""Compiles launches on all cores before they run, into Triton's own cache.

Triton needs Python up to a kernel's first intermediate form; the rest leaves the interpreter lock
alone, and ptxas is a process of its own, so threads use all cores. The cache's key tells which
launches share a binary. What is compiled serves the next start, and other ranks, as well.
"""

import atexit
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import triton

logger = logging.getLogger("vllm.fusedq")


class AheadCompiler:
    """Runs `work`, whose launches are of tensors of device meta, and compiles them in threads.

    What does not compile is left to the launch itself, which then says what was wrong.

    `cache` is the folder that the binaries go to.

    Args:
        work: calls kernels, as `warmup.run_once` does.
        device: the CUDA device to compile for; None for the current one of every thread.
        threads: that compile at a time; None for as many as there are cores.
    """

    def __init__(
        self,
        work: Callable[[], object],
        device: torch.device | None = None,
        threads: int | None = None,
    ) -> None:
        self._work, self._device = work, device
        self.cache = cache_folder()
        self.threads = threads or len(os.sched_getaffinity(0))
        self._thread = threading.Thread(target=self._run, name="fusedq-compile", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is compiled."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._enter()
            pool = ThreadPoolExecutor(self.threads, "fusedq-compile", self._enter)
            with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                self._work()
        except Exception as error:
            logger.warning("Compiling ahead ended early, the warm-up goes on: %s", error)

    def _enter(self) -> None:
        """A new thread's current device is the first."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def cache_folder() -> Path:
    """Where Triton keeps what it compiles, made usable.

    A folder that cannot be written (a read-only image, no home) is replaced for this process: by a
    temporary one that links to what is there, and goes away with the process.
    """
    folder = Path(triton.knobs.cache.dir)
    if _writable(folder):
        return folder
    usable = Path(tempfile.mkdtemp(prefix="fusedq-triton-"))
    # What cannot be read either has nothing to link to
    with suppress(OSError):
        for entry in folder.iterdir():
            (usable / entry.name).symlink_to(entry)
    triton.knobs.cache.dir = str(usable)
    atexit.register(shutil.rmtree, usable, ignore_errors=True)
    logger.warning(
        "Triton's cache %s cannot be written: what is compiled now goes into %s and is lost at the "
        "end. Set TRITON_CACHE_DIR to a folder that stays.",
        *(folder, usable),
    )
    return usable


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
