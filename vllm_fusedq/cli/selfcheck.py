"""`fusedq selfcheck`: every layer's packing and kernel against plain PyTorch, on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_fusedq.cli.options import (
    ActDtypeOption,
    Activations,
    ActivationsOption,
    DeviceOption,
    ExperimentalOption,
    KernelOption,
    check_act_dtype,
    settings_section,
    this_device,
)
from vllm_fusedq.cli.output import ExitCode, console, refusing, writing

if TYPE_CHECKING:
    import torch


def selfcheck(
    model: Annotated[Path, typer.Argument(help="a checkpoint directory")],
    device: DeviceOption = "auto",
    dtype: ActDtypeOption = "bfloat16",
    kernel: KernelOption = "auto",
    only: Annotated[str, typer.Option(help="check layers whose name holds this")] = "",
    activations: ActivationsOption = Activations.AUTO,
    experimental_device: ExperimentalOption = False,
) -> None:
    """Check each layer of MODEL: resident bits against the file, fused kernel against PyTorch.

    vLLM need not be installed, but for kernel cpu-wna16, which is its own.
    """
    import torch

    where = torch.device(this_device(device))
    check_act_dtype(dtype)
    out, err = console(), console(stderr=True)
    with refusing(err):
        settings = settings_section(kernel, activations, experimental_device)
        failed = _run(model, where, getattr(torch, dtype), settings, only, out, err)
    raise typer.Exit(ExitCode.REFUSED if failed else ExitCode.FUSED)


def _run(
    model: Path,
    device: "torch.device",
    dtype: "torch.dtype",
    section: dict[str, str],
    only: str,
    out: Console,
    err: Console,
) -> int:
    """Check and print; the number of layers that failed."""
    from fusedq_kernels.choose.device import current_device
    from vllm_fusedq.checkpoint.read import read_checkpoint
    from vllm_fusedq.integration.operators import register_cpu_operators
    from vllm_fusedq.plan.experts import W2, W13
    from vllm_fusedq.plan.layer import Target
    from vllm_fusedq.plan.model import plan_model
    from vllm_fusedq.prove.selfcheck import check_layer
    from vllm_fusedq.settings import parse_settings, this_cpu

    settings = parse_settings(section)
    on_cpu = device.type == "cpu"
    if on_cpu:
        register_cpu_operators()
    found = this_cpu() if on_cpu else current_device(device)
    device_spec, kept = settings.planned_device(found), settings.keeps_activations
    target = Target(
        device_spec,
        dtype,
        settings.insisted,
        keeps_activations=kept,
        experimental=settings.experimental,
    )
    checkpoint = read_checkpoint(model)
    layers = plan_model(checkpoint, target).layers
    plans = [plan for plan in layers if only in plan.name]
    second = {plan.prefix: plan for plan in layers if plan.shard.weight == W2}
    if not plans:
        raise typer.BadParameter(f"no quantized layer's name holds {only!r}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("layer", "format", "kernel"):
        table.add_column(column, overflow="fold")
    for column in ("wrong values", "max error", "limit", "RMS error"):
        table.add_column(column, justify="right")
    checks = []
    for plan in track(plans, "checking", console=err, transient=True):
        check = check_layer(
            checkpoint,
            plan,
            target,
            device,
            second.get(plan.prefix) if plan.shard.weight == W13 else None,
        )
        checks.append(check)
        table.add_row(
            *(plan.name, plan.formats[0].description, plan.kernel_names, str(check.wrong_values)),
            *(f"{check.max_error:.1e}", f"{check.limit:.1e}", f"{check.rms_error:.1e}"),
            style="" if check.passed else "red",
        )
        if check.wrong_launch:
            err.print(check.wrong_launch, style="red", markup=False, highlight=False)
    worst = max(checks, key=lambda check: check.max_error)
    failed = sum(not check.passed for check in checks)
    launches = sum(check.launches for check in checks)
    what = "passes of experts" if on_cpu else "launches"
    compared = f"; {launches} {what} compared" if launches else ""
    with writing():
        out.print(table)
        out.print(
            f"{len(checks)} layers checked, {failed} failed; worst error {worst.max_error:.1e} of "
            f"the reference's RMS in {worst.plan.name}" + compared,
            highlight=False,
        )
    return failed
