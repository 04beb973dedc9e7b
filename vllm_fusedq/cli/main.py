"""`fusedq check`: the engine's own verdict on a checkpoint, from its headers alone."""

from enum import IntEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_fusedq import __version__
from vllm_fusedq.errors import FusedQError

app = typer.Typer(
    help="Weight-only quantized checkpoints in vLLM: fused on every layer, or not served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


PIPE_WIDTH = 160


class ExitCode(IntEnum):
    """0: everything runs fused; 1: refused; 2: wrong usage (typer's own)."""

    FUSED = 0
    REFUSED = 1


@app.callback()
def _main() -> None:
    pass


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def check(
    model: Annotated[Path, typer.Argument(help="a checkpoint directory")],
    tensor_parallel_size: Annotated[
        str, typer.Option("--tensor-parallel-size", "-tp", help="one size, or several: 1,2,4")
    ] = "1",
    device: Annotated[
        str, typer.Option(help="cpu, a GPU by name (h200, rtx4090, ...) or sm_XX")
    ] = "cpu",
    dtype: Annotated[str, typer.Option(help="activation dtype: bfloat16 or float16")] = "bfloat16",
) -> None:
    """Say which kernel every quantized layer would run, or every reason why it cannot."""
    import torch

    from fusedq_kernels.device import cpu_device, device_by_name
    from vllm_fusedq.checkpoint import read_checkpoint
    from vllm_fusedq.plan import Target
    from vllm_fusedq.preflight import plan_model
    from vllm_fusedq.report import plan_table, summary

    try:
        sizes = [int(size) for size in tensor_parallel_size.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{tensor_parallel_size!r} is not a list of numbers") from None
    if min(sizes) < 1:
        raise typer.BadParameter("tensor-parallel sizes start at 1")
    if dtype not in ("bfloat16", "float16"):
        raise typer.BadParameter(f"dtype {dtype!r}; choose bfloat16 or float16")
    try:
        spec = cpu_device(fused_op=True) if device == "cpu" else device_by_name(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    target = Target(spec, getattr(torch, dtype))

    out, err = _console(), _console(stderr=True)
    refused = False
    for size in sizes:
        out.print(f"tensor_parallel_size {size} on {spec.name}")
        try:
            plan = plan_model(read_checkpoint(model), target, size)
        except FusedQError as error:
            err.print(
                f"refused: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            refused = True
            continue
        out.print(plan_table(plan.layers))
        out.print(summary(plan.layers, plan.unquantized), highlight=False)
    raise typer.Exit(ExitCode.REFUSED if refused else ExitCode.FUSED)


def _console(stderr: bool = False) -> Console:
    """As wide as the terminal; in a pipe wide enough that no name is cut."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)
