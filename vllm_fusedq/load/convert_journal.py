"""What a conversion leaves on the disk while it runs, and how the next run takes it up.

A journal says what was begun; a file gets its name when it is whole and on the disk.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_fusedq import __version__
from vllm_fusedq.checkpoint.read import CONFIG_FILE, Checkpoint
from vllm_fusedq.errors import CheckpointError, OutputError
from vllm_fusedq.formats.fusedq import LAYOUT_VERSION

JOURNAL = "convert.json"
LOCK = "convert.lock"

Progress = Callable[[str, int, int], object]
"""Called with what is going on, the bytes of the source done and those in all."""


@contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Make the folder `partial`, or take over a killed run's, for this process alone.

    Raises:
        OutputError: another process converts into it, or it cannot be made.
    """
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        file = (partial / LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{partial}: another conversion is writing there; wait for it, or convert into "
                "another folder"
            ) from error
        except OSError:
            pass  # A file system without locks
        yield


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
            f"{name}: cannot be written: {reason}; make room or choose another folder; the same "
            "command continues a conversion that was begun"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the operating system says against reading a source file, as a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def begin(
    checkpoint: Checkpoint, partial: Path, max_file_bytes: int, progress: Progress
) -> dict[str, str]:
    """Note in `partial` what is converted, or find that a killed run noted the same.

    Returns the SHA-256 of each source file.

    Raises:
        CheckpointError: `partial` was begun from something else.
    """
    root = Path(checkpoint.path)
    files = [CONFIG_FILE, *sorted({info.file for info in checkpoint.tensors.values()})]
    state = {"version": __version__, "layout_version": LAYOUT_VERSION}
    state["max_file_bytes"] = max_file_bytes
    state["source"] = {name: _stamp(root / name) for name in files}
    journal = partial / JOURNAL
    if any(file.name not in (LOCK, journal.name + ".writing") for file in partial.iterdir()):
        known = _read_journal(journal)
        hashes = known.pop("sha256", None)
        if known == state and isinstance(hashes, dict):
            return hashes
        raise CheckpointError(
            f"{partial}: was begun from other files, by another version or with other settings; "
            "remove it and convert again"
        )
    hashes = dict(_hash_files(root, files, progress))
    with writing(partial):
        write_json(journal, {**state, "sha256": hashes})
    return hashes


def _read_journal(journal: Path) -> dict[str, Any]:
    try:
        known = json.loads(journal.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _stamp(path: Path) -> list[int]:
    """Size and time of change: whether a file is still the one that was hashed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _hash_files(root: Path, files: list[str], progress: Progress) -> Iterator[tuple[str, str]]:
    total, done = sum((root / name).stat().st_size for name in files), 0
    for name in files:
        with reading(root / name), (root / name).open("rb") as file:
            yield name, hashlib.file_digest(file, "sha256").hexdigest()
        done += (root / name).stat().st_size
        progress("hashing", done, total)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is there whole or not at all."""
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
    sync(unfinished)
    unfinished.rename(path)


def sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk before anything that says it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
