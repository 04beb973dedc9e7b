"""Every kernel, as one record: the only place that lists them.

Plans, settings, refusals, warnings, warm-up, the operators and the proof by profile ask a record
and know no kernel by its name. A new kernel is one file in `cuda/` or `cpu/` and one entry here,
by which `tests/kernel_library/test_catalogue.py` tests it. Importing this imports neither torch nor
Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusedq_kernels.choose import heuristics, slices
from fusedq_kernels.choose import refusals as reasons
from fusedq_kernels.cpu import fused, gather, striped, wna16
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    TILED_LAYOUTS,
    WNA16_LAYOUTS,
    DeviceSpec,
    GemmShape,
    Launch,
    Layout,
    Policy,
    QuantSpec,
    Reason,
    TileConfig,
    WeightType,
)

if TYPE_CHECKING:
    import torch

    from fusedq_kernels.call import Call
    from fusedq_kernels.types import PackedWeight


class Op(StrEnum):
    """The operators of `torch.ops.fusedq`, each with kernels of its own."""

    MATMUL = "matmul"
    EMBEDDING = "embedding"


class ChosenBy(StrEnum):
    """What leads to a kernel: the rules for a device, measured rows, or nothing but its name."""

    RULE = "rule"
    ROWS = "rows"
    NAME = "name"


def _no_cautions(spec: QuantSpec, act_dtype: DType) -> tuple[str, ...]:
    return ()


def _none_beside(
    n: int, k: int, spec: QuantSpec, device: DeviceSpec, policy: Policy
) -> heuristics.DeclaredLaunch | None:
    return None


def _no_most_scratch(n: int, k: int, spec: QuantSpec, device: DeviceSpec, policy: Policy) -> int:
    return 0


def _no_scratch(launch: Launch, shape: GemmShape) -> int:
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What there is to know of one kernel.

    Attributes:
        name: what plans, settings and JSON documents say.
        op: the operator that it implements.
        device: `DeviceSpec.kind` of what it runs on.
        layouts: by weight type, the layouts that it reads; a weight that only it reads is kept in
            the first.
        refuses: reasons against K, scheme and phase of a rank's weight, beside `refusals`' common
            ones.
        prepared_by: "module:function" of `prepare`, imported when it is first called.
        seen_as: part of the name under which a profile shows it.
        tiled_launch, tiled_launches: of a kernel with tiles, what `launch` and `launches` give.
        scratch_bytes: the largest of what a launch of a shape allocates beside tokens and outputs.
        scratch_is_seen: whether PyTorch allocates it, so that a profile shows it.
        most_scratch: the most GPU memory of it that any number of tokens takes, for planning.
        beside: the launch of another kernel that measured rows put beside its own.
        batch_invariant: whether it can give a row the same bits in any batch.
        cautions: what `fusedq check` warns of, for a scheme and the activations' dtype.
        chosen_by: what leads to it.
        has_isa: whether it is compiled for an instruction set (`DeviceSpec.cpu_isa`).
        readied_by: "module:function" of what must have run before the first layer is packed.
        bare: "module:function" of what a traced graph may call in place of the operator.
    """

    name: str
    op: Op
    device: str
    layouts: Mapping[WeightType, tuple[Layout, ...]]
    refuses: Callable[[int, QuantSpec, int], tuple[Reason, ...]]
    prepared_by: str
    seen_as: str
    tiled_launch: Callable[[GemmShape, QuantSpec, DeviceSpec, Policy], Launch] | None = None
    tiled_launches: Callable[..., tuple[tuple[int, Launch], ...]] | None = None
    scratch_bytes: Callable[[Launch, GemmShape], int] = _no_scratch
    scratch_is_seen: bool = True
    most_scratch: Callable[[int, int, QuantSpec, DeviceSpec, Policy], int] = _no_most_scratch
    beside: Callable[..., heuristics.DeclaredLaunch | None] = _none_beside
    batch_invariant: bool = False
    cautions: Callable[[QuantSpec, DType], tuple[str, ...]] = _no_cautions
    chosen_by: ChosenBy = ChosenBy.RULE
    has_isa: bool = False
    readied_by: str | None = None
    bare: str | None = None

    def layout(self, weight_type: WeightType) -> Layout:
        """The layout in which it keeps weights of this type; ValueError where there is none."""
        if weight_type not in self.layouts:
            known = ", ".join(each.value for each in self.layouts)
            raise ValueError(f"kernel {self.name} runs {known}, got {weight_type.value}")
        return self.layouts[weight_type][0]

    def is_for(self, device: DeviceSpec) -> bool:
        """Whether it runs on a device, by rule or because it is asked for."""
        compiled = bool(device.cpu_isa) or not self.has_isa
        return device.kind == self.device and compiled and self.chosen_by is not ChosenBy.ROWS

    def launch(
        self, shape: GemmShape, spec: QuantSpec, device: DeviceSpec, policy: Policy = DEFAULT_POLICY
    ) -> Launch:
        if self.tiled_launch is not None:
            return self.tiled_launch(shape, spec, device, policy)
        isa = f", {device.cpu_isa}" if self.has_isa else ""
        return Launch(self.name, None, f"rule: {device.kind}{isa}")

    def launches(
        self,
        n: int,
        k: int,
        spec: QuantSpec,
        device: DeviceSpec,
        max_tokens: int,
        policy: Policy = DEFAULT_POLICY,
    ) -> tuple[tuple[int, Launch], ...]:
        if self.tiled_launches is not None:
            return self.tiled_launches(n, k, spec, device, max_tokens, policy)
        return ((1, self.launch(GemmShape(1, n, k), spec, device, policy)),)

    def prepare(self, call: Call, tile: TileConfig | None) -> Callable[..., None]:
        """`run(x, qweight, scales, zeros, bias, out)` of a matmul for one layer and tile, or
        `run(ids, qweight, scales, zeros, perm, out)` of an embedding.

        Everything that depends on layer and tile alone is decided here. `run` trusts its operands:
        x `[M, K]` with unit column stride and M above 0, ids int64 `[M]` and contiguous, out
        `[M, N]` or `[M, K]` and contiguous, the others as `prepared.Prepared` has checked them.
        """
        return _imported(self.prepared_by)(call, tile)

    def ready(self) -> None:
        """Make it ready to run, or raise RuntimeError saying why it cannot be."""
        if self.readied_by is not None:
            _imported(self.readied_by)()

    def bare_call(self, packed: PackedWeight, act_dtype: torch.dtype) -> Callable[..., None] | None:
        """What a traced graph may call in place of `fusedq::matmul_out`, None where nothing."""
        return _imported(self.bare)(packed, act_dtype) if self.bare is not None else None


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


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
    return tuple(each for each in KERNELS.values() if each.op is op and each.is_for(device))


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
    sizes = reasons.of_sizes(n, k) if kernel.op is Op.MATMUL else ()
    return (*sizes, *kernel.refuses(k, spec, phase))
