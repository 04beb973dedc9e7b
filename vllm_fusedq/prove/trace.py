"""What a trace proves of a fused layer: which kernel ran, and that no weight was unpacked.

`record` marks a call of a layer, `judge` reads the marks from the events of `torch.profiler`. A
dequantized or cast weight would be an allocation of its size, or a copy of a resident tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.profiler import record_function

from fusedq_kernels.catalogue import KERNELS, Op
from fusedq_kernels.geometry import BLOCK_N, round_up
from fusedq_kernels.types import PackedWeight
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.uses import Use

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


def mark(name: str, op: Op = Op.MATMUL) -> str:
    """How a call by one operator of the plan `name` is called in a trace."""
    return f"fusedq {op} of {name}"


def record(name: str, op: Op = Op.MATMUL) -> record_function:
    """Marks what runs in its block as such a call."""
    return record_function(mark(name, op))


def judge(
    plan: LayerPlan, use: Use, packed: PackedWeight, events: Sequence[Any], tokens: int
) -> LayerTrace:
    """Judge one use of a layer.

    Args:
        plan: the layer's.
        use: one of the plan's; it names the kernel that has to have run.
        packed: the resident weight.
        events: `profile(record_shapes=True, profile_memory=True).events()`.
        tokens: the most tokens of a call. Calls with fewer have to reach the same kernel.
    """
    kernel = KERNELS[use.launch(tokens).kernel]
    calls = [event for event in events if event.name == mark(plan.name, use.op)]
    problems = []
    if not calls:
        problems.append("the layer never ran")
    allowed = allowed_bytes(plan, use, tokens)
    resident = [
        list(t.shape) for t in (packed.qweight, packed.scales, packed.zeros) if t is not None
    ]
    kernels: dict[str, None] = {}
    largest = 0
    for call in calls:
        inside = list(_descendants(call))
        operators = [event for event in inside if event.name.startswith(f"fusedq::{use.op}")]
        if len(operators) != 1:
            problems.append(f"{len(operators)} fused operators in one call")
        found = [name for name in _names(inside) if kernel.seen_as in name]
        if not found:
            problems.append(f"no {kernel.seen_as} in a call")
        kernels |= dict.fromkeys(found)
        for event in inside:
            largest = max(largest, _allocated(event))
            if event.name in _COPIES and any(shape in resident for shape in event.input_shapes):
                problems.append(f"{event.name} of a resident tensor {event.input_shapes}")
    dequantized = plan.n * plan.rows * use.call.dtype.itemsize
    if largest > allowed:
        problems.append(
            f"an allocation of {largest} bytes, where activations and workspace explain {allowed}"
        )
    unique = tuple(dict.fromkeys(problems))
    return LayerTrace(
        *(plan, kernel.name, len(calls), tuple(kernels), largest, allowed, dequantized, unique)
    )


def allowed_bytes(plan: LayerPlan, use: Use, tokens: int) -> int:
    """The largest single allocation that a call of `tokens` tokens may need."""
    # A lookup's outputs are rows; a product pads outputs, and pads and reorders what it reads
    widest = max(round_up(plan.n, BLOCK_N), plan.k + 256, plan.rows + 256)
    features = {
        Op.EMBEDDING: plan.k,
        Op.MATMUL: widest,
        # Between the products and for the sum they are fp32
        Op.EXPERTS: 2 * widest,
    }
    activations = tokens * features[use.op] * use.call.dtype.itemsize
    scratch = use.scratch_bytes(tokens) if use.kernel.scratch_is_seen else 0
    return max(activations, scratch) + _SLACK_BYTES


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
