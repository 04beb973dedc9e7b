"""The `fusedq` command: one module per subcommand."""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from vllm_fusedq import __version__
from vllm_fusedq.cli.bench import bench
from vllm_fusedq.cli.check import check
from vllm_fusedq.cli.convert import convert
from vllm_fusedq.cli.output import writing
from vllm_fusedq.cli.quality import quality
from vllm_fusedq.cli.selfcheck import selfcheck
from vllm_fusedq.cli.tune import tune
from vllm_fusedq.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(check)
app.command()(convert)
app.command()(quality)
app.command()(selfcheck)
app.command()(tune)
app.command()(verify)


@app.command()
def version() -> None:
    """Print the version."""
    with writing():
        print(__version__)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def fusedq(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Weight-only quantized checkpoints in vLLM: fused on every layer, or not served."""
    if sys.stdout is None:
        # Closed by the shell (`>&-`): the verdict is the exit code
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name that the terminal's encoding lacks is no reason to die
            stream.reconfigure(errors="backslashreplace")
