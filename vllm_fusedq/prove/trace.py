"""What a trace proves of a fused layer: which kernel ran, and that no weight was unpacked.

`record` marks a call of a layer, `judge` reads the marks from the events of `torch.profiler`. A
dequantized or cast weight would be an allocation of its size, or a copy of a resident tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from fusedq_kernels.choose.heuristics import DECLARED_KERNELS, select
from fusedq_kernels.cpu.kernels import STRIPE_BYTES
from fusedq_kernels.embedding import STRIPE_VALUES
from fusedq_kernels.geometry import BLOCK_K, BLOCK_N, round_up
from fusedq_kernels.types import (
    GatherName,
    GemmShape,
    KernelName,
    Launch,
    PackedWeight,
)
from vllm_fusedq.plan.layer import LayerPlan, Target

MARK, LOOKUP_MARK = "fusedq layer ", "fusedq lookup in "
OPERATOR, LOOKUP_OPERATOR = "fusedq::matmul", "fusedq::embedding"
# What has to appear inside the operator, and what must not, by kernel.
_EVIDENCE = {
    KernelName.CPU_WNA16: "_C::cpu_gemm_wna16",
    KernelName.CPU_STRIPED: "aten::mm",
    # cuBLAS calls kernels gemm as well
    KernelName.TRITON_GEMM: "fused_gemm_kernel",
    # aten::mm or aten::addmm; that no more than a slice was dequantized, the allocations tell.
    KernelName.SLICED_CUBLAS: "mm",
    GatherName.CPU_GATHER: "aten::index",
    GatherName.TRITON_GATHER: "gather_kernel",
}
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::clone")
# Rounding of allocators, bias and group sums of a few rows.
_SLACK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What the trace shows of one layer.

    `kernel` is what the plan says had to run, `kernels` are the names under which it showed itself;
    `largest` is the largest single allocation in bytes within one call, `allowed` what activations
    and declared workspace explain, `dequantized` the bytes of the weight in the activation dtype.
    `problems` is empty if all holds.
    """

    plan: LayerPlan
    kernel: str
    calls: int
    kernels: tuple[str, ...]
    largest: int
    allowed: int
    dequantized: int
    problems: tuple[str, ...]


def record(prefix: str, lookup: bool = False) -> record_function:
    """Marks what runs in its block as a call of the layer `prefix`, or a `lookup` in it."""
    return record_function((LOOKUP_MARK if lookup else MARK) + prefix)


def judge(
    plan: LayerPlan,
    packed: PackedWeight,
    events: Sequence[Any],
    tokens: int,
    target: Target,
    lookup: bool = False,
) -> LayerTrace:
    """Judge one layer.

    Args:
        plan: names the kernel that has to have run.
        packed: the resident weight.
        events: `profile(record_shapes=True, profile_memory=True).events()`.
        tokens: the most tokens of a call. Calls with fewer have to reach the same kernel.
        target: what the layer was planned for.
        lookup: whether the lookups in an embedding are judged instead of products with it.
    """
    mark, operator = (LOOKUP_MARK, LOOKUP_OPERATOR) if lookup else (MARK, OPERATOR)
    act_dtype = target.act_dtype.torch
    kernel = plan.gather if lookup else _launch_at(plan, tokens, target).kernel
    evidence = _EVIDENCE[kernel]
    calls = [event for event in events if event.name == mark + plan.prefix]
    problems = []
    if not calls:
        problems.append("the layer never ran")
    if lookup:
        allowed = lookup_bytes(plan, tokens, act_dtype)
    else:
        allowed = allowed_bytes(plan, tokens, target)
    resident = [
        list(t.shape) for t in (packed.qweight, packed.scales, packed.zeros) if t is not None
    ]
    kernels: dict[str, None] = {}
    largest = 0
    for call in calls:
        inside = list(_descendants(call))
        operators = [event for event in inside if event.name.startswith(operator)]
        if len(operators) != 1:
            problems.append(f"{len(operators)} fused operators in one call")
        found = [name for name in _names(inside) if evidence in name]
        if not found:
            problems.append(f"no {evidence} in a call")
        kernels |= dict.fromkeys(found)
        for event in inside:
            largest = max(largest, _allocated(event))
            if event.name in _COPIES and any(shape in resident for shape in event.input_shapes):
                problems.append(f"{event.name} of a resident tensor {event.input_shapes}")
    dequantized = plan.n * plan.rows * act_dtype.itemsize
    if largest > allowed:
        problems.append(
            f"an allocation of {largest} bytes, where activations and workspace explain {allowed}"
        )
    unique = tuple(dict.fromkeys(problems))
    return LayerTrace(
        *(plan, kernel.value, len(calls), tuple(kernels), largest, allowed, dequantized, unique)
    )


def allowed_bytes(plan: LayerPlan, tokens: int, target: Target) -> int:
    """The largest single allocation that a call of `tokens` tokens may need."""
    columns = round_up(plan.n, BLOCK_N)
    rows = max(plan.k, plan.rows) + 256
    largest = tokens * max(columns, rows) * target.act_dtype.itemsize
    if plan.kernel is KernelName.CPU_STRIPED:
        # fp32 activations, and a stripe of decoded weights
        largest = max(2 * largest, 2 * STRIPE_BYTES)
    launch = _launch_at(plan, tokens, target)
    if launch.tile is not None and launch.tile.split_k > 1:
        largest = max(largest, launch.tile.split_k * tokens * columns * 4)
    if plan.declared is not None and launch.kernel in DECLARED_KERNELS:
        largest = max(largest, plan.declared.workspace_bytes)
    return largest + _SLACK_BYTES


def _launch_at(plan: LayerPlan, tokens: int, target: Target) -> Launch:
    """What the plan lets so many tokens run."""
    if plan.kernel is not KernelName.TRITON_GEMM or target.device.kind == "cpu":
        return plan.decode
    shape = GemmShape(tokens, plan.n, plan.rows)
    return select(
        *(shape, plan.spec, target.device),
        batch_invariant=target.batch_invariant,
        sliced_prefill=target.sliced_prefill,
    )


def lookup_bytes(plan: LayerPlan, tokens: int, act_dtype: torch.dtype) -> int:
    """The largest single allocation that a lookup of `tokens` ids may need."""
    largest = tokens * plan.k * act_dtype.itemsize
    if plan.gather is GatherName.CPU_GATHER:
        # fp32 values of a stripe of rows
        padded = plan.k + BLOCK_K
        largest = max(largest, 4 * min(tokens * padded, max(STRIPE_VALUES, padded)))
    return largest + _SLACK_BYTES


def _descendants(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _descendants(child)


def _names(events: Sequence[Any]) -> Iterator[str]:
    """Names of the operators, and of the GPU kernels that they launched."""
    for event in events:
        yield event.name
        yield from (kernel.name for kernel in event.kernels)


def _allocated(event: Any) -> int:
    return max(event.self_cpu_memory_usage, event.self_device_memory_usage, 0)
