"""Every kernel, as one record (`record.py`): the only place that lists them.

Plans, settings, refusals, warnings, warm-up, the operators and the proof by profile ask a record
and know no kernel by its name. A new kernel is one file in `cuda/` or `cpu/` and one entry here,
by which `tests/kernel_library/test_catalogue.py` tests it. Importing this imports neither torch nor
Triton.
"""

from __future__ import annotations

from fusedq_kernels.choose import expert_memory, experts, heuristics, slices
from fusedq_kernels.choose import refusals as reasons
from fusedq_kernels.cpu import fused, gather, striped, wna16
from fusedq_kernels.record import ChosenBy, Kernel, Op
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    WNA16_LAYOUTS,
    DeviceSpec,
    GemmShape,
    Launch,
    QuantSpec,
    Reason,
    WeightType,
)

_TILED = {each: (layout,) for each, layout in TILED_LAYOUTS.items()}
_ANY = {
    each: (layout, *((WNA16_LAYOUTS[each],) if each in WNA16_LAYOUTS else ()))
    for each, layout in TILED_LAYOUTS.items()
}


def _of_tiled_groups(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    return reasons.of_tiled_scales(spec) + reasons.of_tensor_core_groups(k, spec, phase)


def _partial_sums(launch: Launch, shape: GemmShape) -> int:
    """fp32 sums of each split of K."""
    splits = launch.tile.split_k if launch.tile is not None else 1
    return 4 * splits * shape.m * shape.n if splits > 1 else 0


TRITON_GEMM = Kernel(
    name=heuristics.FUSED,
    op=Op.MATMUL,
    device="cuda",
    layouts=_TILED,
    refuses=_of_tiled_groups,
    prepared_by="fusedq_kernels.cuda.gemm:prepare",
    # cuBLAS calls kernels gemm as well
    seen_as="fused_gemm_kernel",
    tiled_launch=heuristics.select,
    tiled_launches=heuristics.reachable_launches,
    scratch_bytes=_partial_sums,
    most_scratch=heuristics.partial_sum_bytes,
    beside=heuristics.declared_launch,
    batch_invariant=True,
    on_hip=(Op.MATMUL,),
    experts_by="fusedq_kernels.cuda.experts:prepare",
    experts_pass_by="fusedq_kernels.cuda.experts:prepare_pass",
    experts_launch=experts.select,
    experts_launches=experts.reachable,
    experts_scratch=expert_memory.most_scratch,
)
SLICED_CUBLAS = Kernel(
    name=heuristics.SLICED,
    op=Op.MATMUL,
    device="cuda",
    layouts=_TILED,
    refuses=_of_tiled_groups,
    prepared_by="fusedq_kernels.cuda.sliced:prepare",
    # aten::mm or aten::addmm; that no more than a slice was dequantized, the allocations tell.
    seen_as="mm",
    scratch_bytes=lambda launch, shape: slices.workspace_bytes(shape.n, shape.k),
    chosen_by=ChosenBy.ROWS,
)
CPU_FUSED = Kernel(
    name="cpu-fused",
    op=Op.MATMUL,
    device="cpu",
    layouts=_TILED,
    refuses=fused.refuses,
    prepared_by="fusedq_kernels.cpu.fused:prepare",
    seen_as="fusedq_cpu::",
    scratch_bytes=fused.scratch_bytes,
    scratch_is_seen=False,
    batch_invariant=True,
    has_isa=True,
    readied_by="fusedq_kernels.cpu.fused:load",
    bare="fusedq_kernels.cpu.fused:bare_call",
    experts_by="fusedq_kernels.cpu.fused_experts:prepare",
)
CPU_WNA16 = Kernel(
    name="cpu-wna16",
    op=Op.MATMUL,
    device="cpu",
    layouts={each: (layout,) for each, layout in WNA16_LAYOUTS.items()},
    refuses=wna16.refuses,
    prepared_by="fusedq_kernels.cpu.wna16:prepare",
    seen_as="_C::cpu_gemm_wna16",
    cautions=wna16.cautions,
    chosen_by=ChosenBy.NAME,
    bare="fusedq_kernels.cpu.wna16:bare_call",
)
CPU_STRIPED = Kernel(
    name="cpu-striped",
    op=Op.MATMUL,
    device="cpu",
    layouts=_TILED,
    refuses=striped.refuses,
    prepared_by="fusedq_kernels.cpu.striped:prepare",
    seen_as="aten::mm",
    scratch_bytes=striped.scratch_bytes,
    cautions=striped.cautions,
    chosen_by=ChosenBy.NAME,
    experts_by="fusedq_kernels.cpu.experts:prepare",
)
TRITON_GATHER = Kernel(
    name="triton-gather",
    op=Op.EMBEDDING,
    device="cuda",
    layouts=_TILED,
    refuses=_of_tiled_groups,
    prepared_by="fusedq_kernels.cuda.gather:prepare",
    seen_as="gather_kernel",
)
CPU_GATHER = Kernel(
    name="cpu-gather",
    op=Op.EMBEDDING,
    device="cpu",
    layouts=_ANY,
    refuses=gather.refuses,
    prepared_by="fusedq_kernels.cpu.gather:prepare",
    seen_as="aten::index",
    scratch_bytes=gather.scratch_bytes,
)
# Of two that run a weight on a device by rule, the first does.
KERNELS = {
    kernel.name: kernel
    for kernel in (
        *(TRITON_GEMM, SLICED_CUBLAS, CPU_FUSED, CPU_WNA16, CPU_STRIPED),
        *(TRITON_GATHER, CPU_GATHER),
    )
}


def kernel_named(name: str) -> Kernel:
    """The record of a kernel; ValueError, naming all, where there is none."""
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name!r}; known: {', '.join(KERNELS)}")
    return KERNELS[name]


def kernels_for(device: DeviceSpec, op: Op = Op.MATMUL) -> tuple[Kernel, ...]:
    """Every kernel that runs on this device, the preferred one first, then those by name."""
    return tuple(
        each for each in KERNELS.values() if each.implements(op) and each.is_for(device, op)
    )


def kernel_for(device: DeviceSpec, weight_type: WeightType, op: Op = Op.MATMUL) -> Kernel:
    """The one kernel that runs weights of this type on this device by rule."""
    by_rule = (each for each in kernels_for(device, op) if each.chosen_by is ChosenBy.RULE)
    return next(each for each in by_rule if weight_type in each.layouts)


def refusals(kernel: Kernel, n: int, k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Every reason of its own why a kernel cannot run a layer; empty if it can.

    `choose.refusals.of_device` has those against a device as a whole.

    Args:
        kernel: what would run it.
        n, k: out_features and in_features that one rank holds.
        spec: the layer's scheme.
        phase: position of the rank's first input feature within its group.

    Raises:
        ValueError: `k` or `phase` is no valid size (see `geometry.count_groups`).
    """
    sizes = () if kernel.op is Op.EMBEDDING else reasons.of_sizes(n, k)
    return (*sizes, *kernel.refuses(k, spec, phase))
