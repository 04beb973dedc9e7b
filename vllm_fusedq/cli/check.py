"""`fusedq check`: the engine's own verdict on a checkpoint, from its headers alone."""

import re
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vllm_fusedq.cli.options import (
    Activations,
    ActivationsOption,
    Dtype,
    ExperimentalOption,
    TensorParallelSizes,
)
from vllm_fusedq.cli.output import (
    ExitCode,
    console,
    positive_sizes,
    print_json,
    progress_bar,
    refusing,
    writing,
)
from vllm_fusedq.errors import FusedQError, Problem

if TYPE_CHECKING:
    from fusedq_kernels.dtype import DType
    from fusedq_kernels.types import DeviceSpec
    from vllm_fusedq.checkpoint.read import Checkpoint
    from vllm_fusedq.plan.advice import Warned
    from vllm_fusedq.plan.capacity import Capacity, Demand
    from vllm_fusedq.plan.experts import ExpertSplit
    from vllm_fusedq.plan.layer import Target
    from vllm_fusedq.plan.model import ModelPlan


class KvCacheDtype(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FP8 = "fp8"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict at one tensor-parallel size."""

    plan: "ModelPlan"
    problems: tuple[Problem, ...]
    warnings: tuple["Warned", ...]
    notes: tuple["Warned", ...]
    capacity: "Capacity"
    strict: bool

    @property
    def refused(self) -> bool:
        return bool(self.problems) or (self.strict and bool(self.warnings))


def check(
    model: Annotated[
        str, typer.Argument(help="a checkpoint directory, or a repository of the hub: owner/name")
    ],
    tensor_parallel_size: TensorParallelSizes = "1",
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="pipeline stages")
    ] = 1,
    expert_parallel: Annotated[
        bool,
        typer.Option("--expert-parallel", help="whole experts on each rank, not a part of each"),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, a GPU by name (h200, rtx4090, ...) or sm_XX")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="activation dtype")] = Dtype.AUTO,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of a sequence; the model's own by default")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="sequences of that length that the KV cache is to hold")
    ] = 1,
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        typer.Option(help="auto: fp8 by a kv_cache_scheme, else the activations' dtype"),
    ] = KvCacheDtype.AUTO,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="tokens of one step; vllm serve takes 2048 by itself on GPUs under 70 GiB",
        ),
    ] = 8192,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="part of the device that vLLM may use")
    ] = 0.92,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of a repository")
    ] = None,
    activations: ActivationsOption = Activations.AUTO,
    experimental_device: ExperimentalOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse what would only be warned of")
    ] = False,
) -> None:
    """Say which kernel every quantized layer would run, or every reason why it cannot."""
    from vllm_fusedq.checkpoint.read import read_checkpoint
    from vllm_fusedq.formats import format_for
    from vllm_fusedq.plan.capacity import Demand
    from vllm_fusedq.plan.experts import ExpertSplit
    from vllm_fusedq.plan.kv_cache import served_kv_dtype
    from vllm_fusedq.plan.kv_pool import CPU_POOL, GPU_POOL
    from vllm_fusedq.plan.layer import Target
    from vllm_fusedq.report.document import device_json, document, error_json

    sizes = positive_sizes(tensor_parallel_size, "tensor-parallel sizes")
    device = device.lower()
    with refusing(console(stderr=True)):
        spec, memory = _device(device)
    demand = Demand(
        max_model_len,
        max_num_seqs,
        kv_cache_dtype.value,
        gpu_memory_utilization,
        pipeline_parallel_size,
        max_num_batched_tokens,
        CPU_POOL if spec.kind == "cpu" else GPU_POOL,
    )
    content: dict[str, Any] = {"model": model, "device": device_json(spec, memory)}
    try:
        with progress_bar("reading headers") as progress:
            checkpoint = read_checkpoint(model, revision, progress)
        act_dtype = _act_dtype(dtype, checkpoint)
        target = Target(
            spec,
            act_dtype,
            keeps_activations=activations.kept,
            experimental=experimental_device,
        )
        kv_cache = served_kv_dtype(format_for(checkpoint), demand.kv_cache_dtype)
        demand = replace(demand, kv_cache_dtype=kv_cache)
        split = ExpertSplit(expert_parallel)
        results = [
            _result(checkpoint, target, size, split, demand, memory, strict) for size in sizes
        ]
    except FusedQError as error:
        _refuse(error, document("check", **content, error=error_json(error)) if as_json else None)
    with writing():
        if as_json:
            content["dtype"] = target.act_dtype.value
            content["results"] = [_result_json(result, demand) for result in results]
            print_json(document("check", **content))
        else:
            _print_results(results, spec, demand)
    refused = any(result.refused for result in results)
    raise typer.Exit(ExitCode.REFUSED if refused else ExitCode.FUSED)


def _device(name: str) -> tuple["DeviceSpec", int | None]:
    """A device and its memory in bytes."""
    from fusedq_kernels.choose.device import (
        MEMORY_BYTES,
        current_gpu,
        device_by_name,
        device_of_capability,
    )
    from vllm_fusedq.settings import this_cpu

    if name == "auto" and (found := current_gpu()) is not None:
        return found
    if name in ("auto", "cpu"):
        return this_cpu(), None
    if match := re.fullmatch(r"sm_(\d+)(\d)", name):
        return device_of_capability(*map(int, match.groups())), None
    try:
        return device_by_name(name), MEMORY_BYTES.get(name)
    except ValueError as error:
        raise typer.BadParameter(f"{error}, auto, cpu") from None


def _act_dtype(dtype: Dtype, checkpoint: "Checkpoint") -> "DType":
    """vLLM's rule: the config's dtype where it is a 16-bit one, bfloat16 in place of float32."""
    from fusedq_kernels.dtype import DType
    from vllm_fusedq.checkpoint.read import config_sections

    name = dtype.value
    if dtype is Dtype.AUTO:
        sections = config_sections(checkpoint.config)
        stated = [s.get(key) for s in sections for key in ("dtype", "torch_dtype") if s.get(key)]
        name = "float16" if stated[:1] == ["float16"] else "bfloat16"
    return DType(name)


def _result(
    checkpoint: "Checkpoint",
    target: "Target",
    tp_size: int,
    split: "ExpertSplit",
    demand: "Demand",
    memory: int | None,
    strict: bool,
) -> Result:
    from vllm_fusedq.formats import format_for
    from vllm_fusedq.plan.advice import memory_problem, notes_for, warnings_for
    from vllm_fusedq.plan.capacity import block_count, capacity_of
    from vllm_fusedq.plan.kv_cache import kv_dtype_problems
    from vllm_fusedq.plan.model import survey_model

    blocks = block_count(checkpoint)
    if demand.pipeline_parallel_size > blocks:
        raise typer.BadParameter(
            f"{demand.pipeline_parallel_size} pipeline stages for {blocks} layers"
        )
    survey = survey_model(checkpoint, target, tp_size, split=split)
    capacity = capacity_of(checkpoint, survey.plan, target.act_dtype, demand, memory)
    warnings = tuple(warnings_for(checkpoint, survey.plan, target.act_dtype, capacity))
    fmt = format_for(checkpoint)
    problems = (*survey.problems, *kv_dtype_problems(fmt, demand.kv_cache_dtype))
    if not problems and (too_large := memory_problem(checkpoint, capacity)):
        problems = (too_large,)
    notes = tuple(notes_for(checkpoint, capacity, target.device))
    return Result(survey.plan, problems, warnings, notes, capacity, strict)


def _refuse(error: FusedQError, as_json: dict[str, Any] | None) -> None:
    if as_json is not None:
        print_json(as_json)
    else:
        _print_refusal(str(error))
    raise typer.Exit(ExitCode.REFUSED) from error


def _print_refusal(message: str) -> None:
    console(stderr=True).print(
        f"[red]refused: {escape(message)}[/]", highlight=False, soft_wrap=True
    )


def _print_results(results: list[Result], device: "DeviceSpec", demand: "Demand") -> None:
    from vllm_fusedq.errors import PreflightError
    from vllm_fusedq.plan.capacity import NOT_COUNTED
    from vllm_fusedq.report.capacity import capacity_table
    from vllm_fusedq.report.table import fitting_plan, summary

    out = console()
    for result in results:
        plan = result.plan
        experts = ", expert-parallel" if plan.split.parallel else ""
        out.print(f"tensor_parallel_size {plan.tp_size}{experts} on {device.name}")
        out.print(fitting_plan(out, plan.layers, result.problems))
        out.print(summary(plan.layers, plan.unquantized), highlight=False)
        if not result.problems:
            out.print(capacity_table(result.capacity, demand))
            out.print(f"not counted: {NOT_COUNTED}", highlight=False, soft_wrap=True)
        word = "refused (--strict)" if result.strict else "warning"
        for warned in result.warnings:
            out.print(f"{word}: {warned.layer}: {warned.message}", markup=False, highlight=False)
        if result.problems:
            _print_refusal(str(PreflightError(result.problems)))
    for note in dict.fromkeys(note for result in results for note in result.notes):
        out.print(f"note: {note.layer}: {note.message}", markup=False, highlight=False)


def _result_json(result: Result, demand: "Demand") -> dict[str, Any]:
    from vllm_fusedq.report.document import capacity_json, counts_json, layers_json, problems_json

    plan = result.plan
    return {
        "tensor_parallel_size": plan.tp_size,
        "pipeline_parallel_size": demand.pipeline_parallel_size,
        "expert_parallel": plan.split.parallel,
        "verdict": "refused" if result.refused else "fused",
        "layers": layers_json(plan.layers),
        "unquantized": list(plan.unquantized),
        "counts": counts_json(plan.layers, plan.unquantized),
        "problems": problems_json(result.problems),
        "warnings": [asdict(warned) for warned in result.warnings],
        "notes": [asdict(note) for note in result.notes],
        "capacity": None if result.problems else capacity_json(result.capacity),
    }
