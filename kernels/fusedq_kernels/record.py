"""What there is to know of one kernel; `catalogue.py` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusedq_kernels.choose import heuristics
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import (
    DEFAULT_POLICY,
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

    from fusedq_kernels.call import Call, ExpertsCall, Stacks
    from fusedq_kernels.choose.experts import ExpertsLaunch, Load, Served
    from fusedq_kernels.types import PackedWeight


class Op(StrEnum):
    """The operators of `torch.ops.fusedq`, each with kernels of its own."""

    MATMUL = "matmul"
    EMBEDDING = "embedding"
    EXPERTS = "experts"


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
        on_hip: what it does on AMD's GPUs, too.
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
        experts_by: "module:function" of `prepare_experts`, where it runs a stack of experts too.
        experts_pass_by: "module:function" of `prepare_expert_pass`, where there are launches.
        experts_launch, experts_launches, experts_scratch: of such a kernel, what `expert_launch`,
            `expert_launches` and `expert_scratch` give.
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
    on_hip: tuple[Op, ...] = ()
    experts_by: str | None = None
    experts_pass_by: str | None = None
    experts_launch: Callable[..., ExpertsLaunch] | None = None
    experts_launches: Callable[..., tuple[Served, ...]] | None = None
    experts_scratch: Callable[..., int] | None = None

    def layout(self, weight_type: WeightType) -> Layout:
        """The layout in which it keeps weights of this type; ValueError where there is none."""
        if weight_type not in self.layouts:
            known = ", ".join(each.value for each in self.layouts)
            raise ValueError(f"kernel {self.name} runs {known}, got {weight_type.value}")
        return self.layouts[weight_type][0]

    def implements(self, op: Op) -> bool:
        return self.op is op or (op is Op.EXPERTS and self.experts_by is not None)

    def is_for(self, device: DeviceSpec, op: Op) -> bool:
        """Whether it does that on a device, by rule or because it is asked for."""
        if device.kind == "hip":
            return op in self.on_hip
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

    def prepare_experts(
        self, call: ExpertsCall, multiply: Callable[[Call], Callable[..., None]]
    ) -> Callable[..., None]:
        """`run(x, topk_weights, topk_ids, expert_map, w13, w2, out)` of the experts of one layer.

        x `[M, in_features]` and out `[M, N of down]` are contiguous, M above 0; w13 and w2 are the
        stacked qweight, scales, zeros, bias and perm. All are as `experts.PreparedExperts` has
        checked them. `multiply` prepares a matmul by the kernel that a call names.
        """
        return _imported(self.experts_by)(call, multiply)

    def ready(self) -> None:
        """Make it ready to run, or raise RuntimeError saying why it cannot be."""
        if self.readied_by is not None:
            _imported(self.readied_by)()

    def expert_launch(
        self, call: ExpertsCall | Stacks, load: Load, device: DeviceSpec
    ) -> ExpertsLaunch | None:
        """The launch of a layer's experts for a load, None where there are none to choose of."""
        return None if self.experts_launch is None else self.experts_launch(call, load, device)

    def expert_launches(
        self,
        call: ExpertsCall | Stacks,
        top_k: int,
        all_experts: int,
        device: DeviceSpec,
        max_tokens: int,
    ) -> tuple[Served, ...]:
        """Every launch of a layer's experts for 1 to `max_tokens` tokens.

        Args:
            top_k: how many experts a token asks.
            all_experts: how many the layer has on all ranks together.
        """
        if self.experts_launches is None:
            return ()
        return self.experts_launches(call, top_k, all_experts, device, max_tokens)

    def expert_scratch(
        self,
        call: ExpertsCall | Stacks,
        top_k: int,
        all_experts: int,
        device: DeviceSpec,
        max_tokens: int,
        ordered: tuple[bool, bool] = (False, False),
    ) -> int:
        """The most GPU memory that a layer's experts allocate beside tokens and outputs.

        `ordered` says whether w13 and w2 have a perm; the rest is as for `expert_launches`.
        """
        if self.experts_scratch is None:
            return 0
        return self.experts_scratch(call, top_k, all_experts, device, max_tokens, ordered)

    def prepare_expert_pass(
        self, call: ExpertsCall, launch: ExpertsLaunch, top_k: int
    ) -> Callable[..., None]:
        """As `prepare_experts`, by one of `expert_launches`: to warm up and to check.

        `topk_ids` and `expert_map` are int32, and all is contiguous.
        """
        return _imported(self.experts_pass_by)(call, launch, top_k)

    def bare_call(self, packed: PackedWeight, act_dtype: torch.dtype) -> Callable[..., None] | None:
        """What a traced graph may call in place of `fusedq::matmul_out`, None where nothing."""
        return _imported(self.bare)(packed, act_dtype) if self.bare is not None else None


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
