"""Makes a worker's refusal the last thing that the user reads.

A worker process that refuses dies under vLLM's own tracebacks. It leaves its message in a file
whose name travels in the pickled config; the API process prints that file when it exits.
"""

import atexit
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_fusedq.errors import FusedQError


def name_message_file() -> str | None:
    """Name a file that this process prints and removes at exit, should a worker write it.

    None where there is no temporary directory: the worker's traceback has to do then.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except OSError:
        return None
    path = folder / f"fusedq-refusal-{secrets.token_hex(16)}.txt"
    atexit.register(_print_and_remove, path)
    return str(path)


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
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError:
        return  # Another rank was first, or it is another machine: the traceback still says it.
    with open(descriptor, "w") as file:
        file.write(message)


def _print_and_remove(path: Path) -> None:
    try:
        message = path.read_text()
        path.unlink()
    except OSError:
        return
    sys.stdout.flush()
    print(f"\nvllm-fusedq refused to serve this checkpoint.\n{message}", file=sys.stderr)
