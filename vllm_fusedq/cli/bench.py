"""`fusedq bench`: how fast each layer of a model runs on this machine."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

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
from vllm_fusedq.cli.output import (
    ExitCode,
    check_writable,
    console,
    positive_sizes,
    print_json,
    progress_bar,
    refusing,
    writing,
    writing_file,
)

if TYPE_CHECKING:
    import torch

    from vllm_fusedq.measure.bench import Bench
    from vllm_fusedq.measure.serving import Served
    from vllm_fusedq.plan.layer import LayerPlan


def bench(
    model: Annotated[
        str, typer.Argument(help="a quantized checkpoint, or a repository of the hub: owner/name")
    ],
    tokens: Annotated[str, typer.Option(help="numbers of tokens M")] = "1,4,16,64,256,2048",
    device: DeviceOption = "auto",
    dtype: ActDtypeOption = "bfloat16",
    kernel: KernelOption = "auto",
    activations: ActivationsOption = Activations.AUTO,
    experimental_device: ExperimentalOption = False,
    tensor_parallel_size: Annotated[
        int,
        typer.Option("--tensor-parallel-size", "-tp", min=1, help="one rank's layers"),
    ] = 1,
    only: Annotated[str, typer.Option(help="time layers whose name holds this")] = "",
    rounds: Annotated[int, typer.Option(min=3, help="on a CPU: calls of each kind at most")] = 15,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="time vLLM's engine too, by fusedq and by stock vLLM, and its start"
        ),
    ] = False,
    batches: Annotated[str, typer.Option(help="of --serve: sequences at a time")] = "1,8,32",
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of a repository")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="a PNG file to write, with what decoding costs")
    ] = None,
) -> None:
    """Time each distinct layer of MODEL, and the layer unquantized, on this machine.

    Headers alone are read, weights are random; --serve needs the weights. Weights are in no cache
    when they are read, and the bandwidth of plain reading is measured in the same run.
    """
    import torch

    where = torch.device(this_device(device))
    check_act_dtype(dtype)
    if serve and find_spec("vllm") is None:
        raise typer.BadParameter("--serve: vLLM is not installed; see the README")
    sizes = positive_sizes(tokens, "--tokens")
    at_a_time = positive_sizes(batches, "--batches")
    section = settings_section(kernel, activations, experimental_device)
    err = console(stderr=True)
    with refusing(err):
        from vllm_fusedq.measure.extras import require

        if plot is not None:
            require("matplotlib", "--plot", "bench")
            check_writable(plot)
        plans, name = _plans(model, revision, where, dtype, section, tensor_parallel_size, only)
        found = _timed(plans, sizes, where, name, rounds, _ablates(where, plot, err))
        served = _served(model, dtype, revision, section, at_a_time) if serve else []
        if plot is not None:
            from vllm_fusedq.measure.bench_figure import draw

            with writing_file(plot):
                draw(model, found, plot)
    with writing():
        _print(model, found, served, as_json)
    raise typer.Exit(ExitCode.FUSED)


def _plans(
    model: str,
    revision: str | None,
    device: "torch.device",
    dtype: str,
    section: dict[str, str],
    tp_size: int,
    only: str,
) -> tuple[list["LayerPlan"], str]:
    """The layers to time, and what the device is called."""
    from fusedq_kernels.choose.device import current_device
    from vllm_fusedq.checkpoint.read import read_checkpoint
    from vllm_fusedq.integration.operators import register_cpu_operators
    from vllm_fusedq.measure.machine import describe
    from vllm_fusedq.plan.layer import Target
    from vllm_fusedq.plan.model import plan_model
    from vllm_fusedq.settings import parse_settings, this_cpu

    settings = parse_settings(section)
    if device.type == "cpu":
        register_cpu_operators()
    spec = this_cpu() if device.type == "cpu" else current_device(device)
    target = Target(
        settings.planned_device(spec),
        dtype,
        settings.insisted,
        keeps_activations=settings.keeps_activations,
        experimental=settings.experimental,
    )
    with progress_bar("reading headers") as progress:
        checkpoint = read_checkpoint(model, revision, progress)
    plan = plan_model(checkpoint, target, tp_size)
    plans = [layer for layer in plan.layers if only in layer.name]
    if not plans:
        raise typer.BadParameter(f"no quantized layer's name holds {only!r}")
    return plans, describe(device)


def _ablates(device: "torch.device", plot: Path | None, err: Console) -> bool:
    """Whether kernels without decoding are timed, which the figure shows; ready to run then."""
    from fusedq_kernels.native.build import BuildError
    from vllm_fusedq.measure.undecoded import load

    if plot is None or device.type != "cpu":
        return plot is not None
    try:
        with err.status("compiling the kernel without decoding, once: a minute"):
            load()
    except BuildError as error:
        told = f"what decoding costs is not measured: {error}"
        err.print(told, markup=False, highlight=False, soft_wrap=True)
        return False
    return True


def _timed(
    plans: list["LayerPlan"],
    tokens: list[int],
    device: "torch.device",
    name: str,
    rounds: int,
    ablate: bool,
) -> "Bench":
    from vllm_fusedq.measure.bench import bench as run

    with progress_bar("timing layers") as progress:
        return run(plans, tokens, device, name, progress, rounds, ablate)


def _served(
    model: str, dtype: str, revision: str | None, section: dict[str, str], batches: list[int]
) -> "list[Served]":
    from vllm_fusedq.measure.serving import serve

    err = Console(stderr=True)
    with err.status("starting vLLM's engine") as status:
        return serve(
            *(model, dtype, revision, section, batches),
            lambda way: status.update(f"vLLM's engine: {way}"),
        )


def _print(model: str, found: "Bench", served: "list[Served]", as_json: bool) -> None:
    from vllm_fusedq.measure import bench_report as report

    if as_json:
        print_json(report.bench_json(model, found, served))
        return
    out = console()
    out.print(report.layers_table(found))
    out.print(report.steps_table(found))
    if served:
        out.print(report.serving_table(served))
    out.print(report.summary(found), markup=False, highlight=False, soft_wrap=True)
    for side in served:
        if side.failed:
            out.print(f"not served by {side.failed}", markup=False, highlight=False, soft_wrap=True)
