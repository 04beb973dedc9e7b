"""Makes a worker's refusal the last thing that the user reads.

A worker process that refuses dies under vLLM's own tracebacks. It leaves its message in a file
whose name travels in the pickled config; the API process prints that file when it exits.
"""

import atexit
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_fusedq.errors import FusedQError


def open_message_file() -> str | None:
    """Create the (empty) message file in this process and print it at exit if it was filled.

    None where no file can be written: the worker's traceback has to do then.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix="fusedq-refusal-", suffix=".txt")
    except OSError:
        return None
    os.close(descriptor)
    atexit.register(_print_and_remove, Path(name))
    return name


@contextmanager
def speaking_last(message_file: str | None) -> Iterator[None]:
    """Copy a FusedQError's message to the file on its way out."""
    try:
        yield
    except FusedQError as error:
        if message_file is not None:
            _write_once(Path(message_file), f"{type(error).__name__}: {error}\n")
        raise


def _write_once(path: Path, message: str) -> None:
    try:
        if path.stat().st_size == 0:
            path.write_text(message)
    except OSError:
        return  # Another machine or a cleaned-up directory: the traceback still says it.


def _print_and_remove(path: Path) -> None:
    try:
        message = path.read_text()
        path.unlink()
    except OSError:
        return
    if message:
        sys.stdout.flush()
        print(f"\nvllm-fusedq refused to serve this checkpoint.\n{message}", file=sys.stderr)
