"""`fusedq convert`: a checkpoint that loads without repacking."""

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_fusedq.cli.options import Activations, ActivationsOption
from vllm_fusedq.cli.output import console, refusing, writing


def convert(
    model: Annotated[Path, typer.Argument(help="a quantized checkpoint directory")],
    out: Annotated[Path, typer.Argument(help="the folder to make; OUT.partial until it is whole")],
    max_file_gb: Annotated[
        float, typer.Option(min=0.001, help="begin a new weight file after so many GB of the model")
    ] = 2.0,
    activations: ActivationsOption = Activations.AUTO,
) -> None:
    """Write MODEL in the layout that its kernels read, for every tensor-parallel size.

    The result is served like any other checkpoint and gives bit-identical results.

    A run that was killed leaves OUT.partial, which never loads; the next run begins again.
    """
    from vllm_fusedq.load.convert import convert as run

    if not isfinite(max_file_gb):
        raise typer.BadParameter(f"--max-file-gb {max_file_gb} is no size")
    err = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with (
        refusing(err),
        Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar,
    ):
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        done = run(model, out, round(max_file_gb * 1e9), show, activations.kept)
    removed = f"begun again: {out}.partial held files of a killed run" if done.began_again else ""
    for note in filter(None, (removed, done.note)):
        err.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with writing():
        print(
            f"{out}: {done.layers} layers converted, {done.source_bytes / 1e6:.1f} MB became "
            f"{done.bytes / 1e6:.1f} MB"
        )
