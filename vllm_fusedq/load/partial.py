"""The folder that a conversion writes: another name until it is whole, one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_fusedq.errors import CheckpointError, OutputError

LOCK = "convert.lock"
"""Locked by the process that writes the folder, and left in it by one that was killed."""


@contextmanager
def claimed(partial: Path) -> Iterator[tuple[Path, bool]]:
    """Make the empty folder `partial`, for this process alone; it goes where an exception passes.

    Yields it, and whether a killed run's files were removed from it.

    Raises:
        OutputError: another process converts into it, or it cannot be made.
        CheckpointError: it is there and no conversion made it.
    """
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        left = {file.name for file in partial.iterdir()}
        if left and LOCK not in left:
            raise CheckpointError(
                f"{partial}: exists, and no conversion made it; remove it, or convert into another "
                "folder"
            )
        lock = (partial / LOCK).open("w")
    with lock:
        _lock(lock.fileno(), partial, new=not left)
        try:
            with writing(partial):
                for file in partial.iterdir():
                    if file.name != LOCK:
                        file.unlink()
            yield partial, bool(left)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish(partial: Path, out: Path) -> None:
    """Give a claimed folder its name, once everything in it is on the disk."""
    with writing(partial):
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(out)
        # Not before: another process could claim the folder
        (out / LOCK).unlink()
        _sync(out.parent)


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """What the operating system says against writing, as an OutputError.

    The safetensors library has an error of its own, whose text names no file.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        name, reason = partial, str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        if isinstance(error, OSError):
            name, reason = error.filename or partial, error.strerror or reason
        raise OutputError(
            f"{name}: cannot be written: {reason}; make room or choose another folder"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the operating system says against reading a source file, as a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def _lock(descriptor: int, partial: Path, new: bool) -> None:
    """Lock the folder's file; on a file system without locks only a `new` folder is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"{partial}: another conversion is writing there; wait for it, or convert into "
            "another folder"
        ) from error
    except OSError as error:
        if not new:
            raise OutputError(
                f"{partial}: begun by another conversion, and this file system has no locks to "
                "tell whether it still runs; remove it, or convert into another folder"
            ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
