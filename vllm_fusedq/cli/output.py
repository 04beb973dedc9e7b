"""What all subcommands share: exit codes, and consoles for terminals and pipes."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_fusedq.hub import Progress as OnProgress


class ExitCode(IntEnum):
    """0: everything runs fused; 1: refused; 2: wrong usage (typer's own)."""

    FUSED = 0
    REFUSED = 1


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; in a pipe without colours and so wide that no name is cut."""
    from vllm_fusedq.report import LOG_WIDTH

    found = Console(stderr=stderr)
    if found.is_terminal:
        return found
    return Console(stderr=stderr, width=LOG_WIDTH, color_system=None)


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
