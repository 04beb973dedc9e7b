"""What a trace proves of a fused layer: which kernel ran, and that no weight was unpacked.

`record` marks a call of a layer, `judge` reads the marks from the events of `torch.profiler`. A
dequantized or cast weight would be an allocation of its size, or a copy of a resident tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.types import GemmShape, Launch, PackedWeight
from vllm_fusedq.plan.layer import LayerPlan, Target

MARK, LOOKUP_MARK = "fusedq layer ", "fusedq lookup in "
OPERATOR, LOOKUP_OPERATOR = "fusedq::matmul", "fusedq::embedding"
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
    launch, act_dtype = _launch_at(plan, tokens, target, lookup), target.act_dtype.torch
    evidence = KERNELS[launch.kernel].seen_as
    calls = [event for event in events if event.name == mark + plan.prefix]
    problems = []
    if not calls:
        problems.append("the layer never ran")
    allowed = allowed_bytes(plan, packed, launch, tokens, act_dtype, lookup)
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
        *(plan, launch.kernel, len(calls), tuple(kernels), largest, allowed, dequantized, unique)
    )


def allowed_bytes(
    plan: LayerPlan,
    packed: PackedWeight,
    launch: Launch,
    tokens: int,
    act_dtype: torch.dtype,
    lookup: bool = False,
) -> int:
    """The largest single allocation that a call of `tokens` tokens may need."""
    # A lookup's outputs are rows; a product pads and reorders what it reads.
    columns = plan.k if lookup else max(packed.scales.shape[1], plan.n)
    rows = plan.k if lookup else max(plan.k, plan.rows) + 256
    shape = GemmShape(tokens, plan.n, plan.rows)
    scratch = KERNELS[launch.kernel].scratch_bytes(launch, shape)
    return max(tokens * max(columns, rows) * act_dtype.itemsize, scratch) + _SLACK_BYTES


def _launch_at(plan: LayerPlan, tokens: int, target: Target, lookup: bool) -> Launch:
    """What the plan lets so many tokens run."""
    kernel = KERNELS[plan.gather if lookup else plan.kernel]
    shape = GemmShape(tokens, plan.n, plan.rows)
    return kernel.launch(shape, plan.spec, target.device, target.policy)


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
