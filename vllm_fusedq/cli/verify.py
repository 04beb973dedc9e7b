"""`fusedq verify`: what the profiler saw of every fused layer in the running engine."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from vllm_fusedq.cli.options import (
    ActDtypeOption,
    Activations,
    ActivationsOption,
    ExperimentalOption,
    KernelOption,
    check_act_dtype,
    settings_section,
)
from vllm_fusedq.cli.output import ExitCode, console, refusing, writing


def verify(
    model: Annotated[Path, typer.Argument(help="a checkpoint directory")],
    dtype: ActDtypeOption = "bfloat16",
    kernel: KernelOption = "auto",
    max_model_len: Annotated[int, typer.Option(min=128, help="as in vllm serve")] = 256,
    activations: ActivationsOption = Activations.AUTO,
    experimental_device: ExperimentalOption = False,
) -> None:
    """Load MODEL in vLLM's engine, run prefill and decode, and prove from the trace what ran.

    For every layer: the kernel that its plan names ran, once per call, and no allocation or copy
    was as large as an unpacked weight, with 1 to 4096 tokens.
    """
    if find_spec("vllm") is None:
        raise typer.BadParameter("vLLM is not installed, whose engine this runs; see the README")
    from vllm_fusedq.integration.verify import SIZES
    from vllm_fusedq.integration.verify import verify as run

    check_act_dtype(dtype)
    out, err = console(), console(stderr=True)
    with refusing(err):
        settings = settings_section(kernel, activations, experimental_device)
        traces = run(str(model), dtype, settings, max_model_len)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("layer", "kernel", "seen as", "calls"):
        table.add_column(column, overflow="fold")
    for column in ("largest MB", "explained MB", "unpacked MB"):
        table.add_column(column, justify="right")
    seen = {(trace.plan.name, trace.kernel): trace for trace in reversed(traces)}
    failed = {}
    for trace in traces:
        failed |= {(trace.plan.name, problem): None for problem in trace.problems}
    for (name, kernel_name), trace in reversed(seen.items()):
        sizes = (trace.largest, trace.allowed, trace.dequantized)
        table.add_row(
            *(name, kernel_name, ", ".join(trace.kernels), str(trace.calls)),
            *(f"{size / 1e6:.3f}" for size in sizes),
        )
    wrong = len({name for name, _ in failed})
    count = len({name for name, _ in seen})
    with writing():
        out.print(table)
        for name, problem in failed:
            err.print(f"{name}: {problem}", style="red", markup=False, highlight=False)
        out.print(
            f"{count} layers verified in the engine and with {SIZES[0]} to {SIZES[-1]} tokens, "
            f"{wrong} failed",
            highlight=False,
        )
    raise typer.Exit(ExitCode.REFUSED if failed else ExitCode.FUSED)
