"""`fusedq tune`: measures a checkpoint's own shapes on this GPU, for the plans that follow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vllm_fusedq.cli.options import (
    ActDtypeOption,
    Activations,
    ActivationsOption,
    TensorParallelSizes,
    check_act_dtype,
)
from vllm_fusedq.cli.output import (
    ExitCode,
    console,
    positive_sizes,
    progress_bar,
    refusing,
    writing,
)

if TYPE_CHECKING:
    from fusedq_kernels.types import DeviceSpec
    from vllm_fusedq.measure.rows_file import RowsFile
    from vllm_fusedq.measure.tuner import Job, Measured, Tuner


def tune(
    model: Annotated[
        str, typer.Argument(help="a checkpoint directory, or a repository of the hub: owner/name")
    ],
    tensor_parallel_size: TensorParallelSizes = "1",
    dtype: ActDtypeOption = "bfloat16",
    seconds: Annotated[
        float | None, typer.Option(min=0, help="stop after so long; the next run goes on")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="tiles that are tried per step")] = 16,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of a repository")
    ] = None,
    activations: ActivationsOption = Activations.AUTO,
) -> None:
    """Measure the launches of MODEL's layers on this GPU; servers and plans here take the fastest.

    Only headers are read, weights are random. A run that ends at any moment is gone on with by the
    next one.
    """
    import torch

    check_act_dtype(dtype)
    sizes = positive_sizes(tensor_parallel_size, "tensor-parallel sizes")
    out, err = console(), console(stderr=True)
    with refusing(err):
        device, triton = _this_gpu()
        from vllm_fusedq.measure.tuner import Tuner

        act_dtype = getattr(torch, dtype)
        jobs, file = _jobs(model, revision, sizes, dtype, activations.kept, device, triton)
        tuner = Tuner(torch.device("cuda"), device, act_dtype, keep)
        measure_all(jobs, file, tuner, seconds, out)
    raise typer.Exit(ExitCode.FUSED)


def measure_all(
    jobs: "Sequence[Job]",
    file: "RowsFile",
    tuner: "Tuner",
    seconds: float | None,
    out: Console,
) -> None:
    """Measure and print, with each step in the file before the next one."""
    total, done = sum(len(job.tokens) for job in jobs), 0
    with file.alone(), writing():
        for found in tuner.run(jobs, seconds):
            file.add(found.measurements)
            done = found.done
            for line in _lines(found):
                out.print(line, markup=False, highlight=False)
        rest = total - done
        words = f"{len(file.rows)} rows in {file.path}"
        if rest:
            words += f"; {rest} of {total} steps remain: run it again"
        out.print(words, markup=False, highlight=False, soft_wrap=True)


def _lines(found: "Measured") -> list[str]:
    from dataclasses import asdict

    left = f"[{found.done}/{found.total}, about {found.remaining:.0f} s left]"
    head = f"{left} {found.job} with {found.m} tokens:"
    lines = [
        f"discarded: {trial.launch.kernel} {trial.launch.tile or ''}: {trial.note}"
        for trial in found.discarded
    ]
    if (best := found.best) is None:
        return [*lines, f"{head} no launch is right, the rules stay"]
    what = best.launch.kernel
    if best.launch.tile is not None:
        sizes = "{block_m}x{block_n} split {split_k} warps {num_warps} stages {num_stages}"
        what = sizes.format(**asdict(best.launch.tile))
    rules = found.trials[0].timing
    against = f", the rules' tile {rules.us:.1f} us" if rules else ""
    return [*lines, f"{head} {best.timing.us:.1f} us, {what}{against}"]


def _this_gpu() -> "tuple[DeviceSpec, str]":
    """This machine's GPU and the version of its Triton.

    Raises:
        KernelError: there is none.
    """
    from fusedq_kernels.choose.device import SUPPORTED_DEVICES, current_gpu
    from fusedq_kernels.choose.tuning import triton_version
    from vllm_fusedq.errors import KernelError

    found, triton = current_gpu(), triton_version()
    if found is None or triton is None:
        missing = "GPU that torch can use" if found is None else "Triton"
        raise KernelError(
            f"fusedq tune: found no {missing} here; supported: {SUPPORTED_DEVICES}, of which it "
            "tunes the GPUs; run it on the machine that will serve"
        )
    return found[0], triton


def _jobs(
    model: str,
    revision: str | None,
    sizes: Sequence[int],
    dtype: str,
    keeps_activations: bool,
    device: "DeviceSpec",
    triton: str,
) -> "tuple[list[Job], RowsFile]":
    from fusedq_kernels.dtype import DType
    from vllm_fusedq.checkpoint.read import read_checkpoint
    from vllm_fusedq.measure.candidates import DECODE_BUCKETS, PREFILL_BUCKETS
    from vllm_fusedq.measure.rows_file import RowsFile, tunable
    from vllm_fusedq.plan.layer import Target
    from vllm_fusedq.plan.model import plan_model

    file = RowsFile(device, triton)
    with progress_bar("reading headers") as progress:
        checkpoint = read_checkpoint(model, revision, progress)
    target = Target(device, DType(dtype), keeps_activations=keeps_activations)
    plans = [plan for size in sizes for plan in plan_model(checkpoint, target, size).layers]
    return file.left_of(tunable(plans), (*DECODE_BUCKETS, *PREFILL_BUCKETS)), file
