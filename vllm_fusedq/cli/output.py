"""What all subcommands share: exit codes, and consoles for terminals and pipes."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import IO, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_fusedq.checkpoint.hub import Progress as OnProgress
from vllm_fusedq.errors import FusedQError, OutputError


class ExitCode(IntEnum):
    """0: everything runs fused; 1: refused; 2: wrong usage (typer's own); 3: not written."""

    FUSED = 0
    REFUSED = 1
    NOT_WRITTEN = 3


class _Console(Console):
    """A console whose reader may go away (`| head`): the exit code stays that of the verdict."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _discard(self.file)


def print_json(content: dict[str, Any]) -> None:
    """A document on stdout; its reader may go away."""
    try:
        print(json.dumps(content, indent=2), flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)


@contextmanager
def writing() -> Iterator[None]:
    """Output that cannot be written, as on a full disk, is no verdict: it has its own exit code.

    A reader that goes away (`| head`) has read what it wanted: the exit code stays.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        reason = error.strerror or error
        console(stderr=True).print(f"the output cannot be written: {reason}", style="red")
        raise typer.Exit(ExitCode.NOT_WRITTEN) from error


@contextmanager
def refusing(err: Console) -> Iterator[None]:
    """A refusal is one message on `err` and an exit code, no traceback."""
    try:
        yield
    except FusedQError as error:
        unwritten = isinstance(error, OutputError)
        message = str(error) if unwritten else f"refused: {error}"
        err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(ExitCode.NOT_WRITTEN if unwritten else ExitCode.REFUSED) from None


def check_writable(path: Path) -> None:
    """Before long work begins: raise OutputError where no file of this name can be written."""
    folder = path.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)) or path.is_dir():
        raise OutputError(
            f"{path} cannot be written: name a file in a directory that you may write"
        )


@contextmanager
def writing_file(path: Path) -> Iterator[None]:
    """A file that cannot be written after all is an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def positive_sizes(text: str, what: str, least: int = 1) -> list[int]:
    """Numbers like "1,2,4", each once; wrong usage where one is none or below `least`."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers") from None
    if min(sizes) < least:
        raise typer.BadParameter(f"{what} start at {least}")
    return list(dict.fromkeys(sizes))


def _discard(file: IO[str]) -> None:
    """Have what is still buffered, and all that follows, go nowhere instead of failing at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; in a pipe without colours and so wide that no name is cut."""
    from vllm_fusedq.report.table import LOG_WIDTH

    found = _Console(stderr=stderr)
    if found.is_terminal:
        return found
    return _Console(stderr=stderr, width=LOG_WIDTH, color_system=None)


@contextmanager
def progress_bar(what: str) -> Iterator[OnProgress]:
    """A bar on stderr from its first report on; nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    err = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
