"""The rule that decides: a weight's shard on one device becomes a `LayerPlan`, or is refused.

`model.py` (checkpoint headers, no vLLM) and the vLLM linear method (real partition sizes) both
ask `plan_layer`, so the pre-flight verdict is the runtime verdict.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from fusedq_kernels import catalogue
from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS, Op
from fusedq_kernels.choose.device import SUPPORTED_DEVICES
from fusedq_kernels.choose.refusals import of_device
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.resident import PERM_DTYPE, ResidentTensor, resident_tensors
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    DeviceSpec,
    Launch,
    Layout,
    Policy,
    QuantSpec,
    Reason,
    WeightType,
)
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.ordering import resident_rows, resident_spec
from vllm_fusedq.plan.activations import check_activations
from vllm_fusedq.plan.one_scheme import of_one_scheme
from vllm_fusedq.plan.shards import LayerShard
from vllm_fusedq.plan.uses import Use

_OTHER_KERNEL = 'choose another "kernel" in additional-config "fusedq", or leave it out'


@dataclass(frozen=True, slots=True)
class Target:
    """Where a plan is for: the device decides the kernels, the dtype what they multiply by.

    A layer that the kernel `insisted` on cannot run is refused; None lets the device decide for
    each layer. A torch dtype may be given as `act_dtype` and is kept by name. What quantizes
    activations too is refused unless `keeps_activations`: then its weights alone are served. A
    device on which nothing was run is refused unless `experimental`.
    """

    device: DeviceSpec
    act_dtype: DType
    insisted: str | None = None
    policy: Policy = DEFAULT_POLICY
    keeps_activations: bool = False
    experimental: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "act_dtype", DType.of(self.act_dtype))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one rank runs one weight of a vLLM layer.

    `uses` is what is done with it: a linear layer's is multiplied by, an embedding's rows are
    gathered, and with one that is the lm_head too both is done. The last is its `main` use, which
    decides the layout. Where `ordered`, the activation is gathered into `rows` features once before
    the kernel. `resident` is the bytes of each tensor that stays in memory, by `PackedWeight` field
    name, of all experts together where the shard has experts; n and k are then of one of them.
    """

    shard: LayerShard
    formats: tuple[LayerFormat, ...]
    ordered: bool
    uses: tuple[Use, ...]
    resident: tuple[tuple[str, int], ...]

    @property
    def prefix(self) -> str:
        return self.shard.prefix

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def n(self) -> int:
        return self.shard.n

    @property
    def k(self) -> int:
        return self.shard.k

    @property
    def experts(self) -> tuple[int, ...] | None:
        """Those that the rank holds, by their number in the model; None of a weight without any."""
        return self.shard.experts

    @property
    def main(self) -> Use:
        return self.uses[-1]

    @property
    def rows(self) -> int:
        """Those of the resident weight along K."""
        return self.main.call.k

    @property
    def spec(self) -> QuantSpec:
        """The resident weight's scheme."""
        return self.main.call.spec

    @property
    def phase(self) -> int:
        """The position of the resident weight's first row in its group."""
        return self.main.call.phase

    @property
    def layout(self) -> Layout:
        return self.main.call.layout

    @property
    def kernel_names(self) -> str:
        """Like "cpu-wna16", "cpu-gather" or, of a tied embedding, "cpu-gather + cpu-wna16"."""
        return " + ".join(use.call.kernel for use in self.uses)

    def use(self, op: Op) -> Use | None:
        """The use by one operator, None where there is none."""
        return next((use for use in self.uses if use.op is op), None)

    def launch(self, tokens: int) -> Launch:
        """What so many tokens run in the main use."""
        return self.main.launch(tokens)

    @property
    def weight_bytes(self) -> int:
        return dict(self.resident)["qweight"]

    @property
    def metadata_bytes(self) -> int:
        """Scales, zero points, activation order and biases of experts."""
        return sum(size for _, size in self.resident) - self.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Resident bits, padding and metadata included, per weight of this rank's shard."""
        return 8 * sum(size for _, size in self.resident) / (self.n * self.k * self.shard.count)

    def of_expert(self, index: int) -> LayerPlan:
        """One of the rank's experts, by its place among them, as a weight of its own."""
        shard, count = self.shard.of_expert(index), self.shard.count
        each = len(shard.parts)
        return replace(
            self,
            shard=shard,
            uses=tuple(replace(use, op=use.kernel.op) for use in self.uses),
            formats=self.formats[index * each : (index + 1) * each],
            resident=tuple((name, size // count) for name, size in self.resident),
        )


def plan_layer(
    shard: LayerShard, formats: Mapping[str, LayerFormat | None], target: Target
) -> LayerPlan:
    """Plan one layer's shard.

    Args:
        shard: what the rank holds.
        formats: for each part's module, how the checkpoint stores it; None or none if unquantized.
        target: device, activation dtype, insisted kernel.

    Raises:
        PreflightError: every reason why no fused kernel can run this shard.
    """
    layer_formats = of_one_scheme(shard, formats)
    if problems := target_problems(target):
        raise PreflightError(problems)
    if not target.keeps_activations:
        check_activations(shard, layer_formats)
    first, region = layer_formats[0], shard.parts[0].region
    if first.ordered:
        rows, spec, phase = resident_rows(first, region), resident_spec(first, region), 0
    else:
        rows, spec, phase = shard.k, first.spec, region.k_start % first.spec.group_size
    choice = _choose(shard.ops, (shard.n, rows, shard.k), spec, phase, target)
    if choice.reasons:
        # One module may hold several parts, and all experts are alike
        one = dict.fromkeys(layer_formats[: len(layer_formats) // shard.count])
        full = " + ".join(f"[{layer.n}, {layer.k}]" for layer in one)
        where = f"{full} full, [{shard.n}, {shard.k}] per rank at tensor_parallel_size "
        where += str(shard.tp_size)
        layer = f"{shard.name} (out_features x in_features {where})"
        raise PreflightError([Problem(layer, *reason) for reason in choice.reasons])
    if set(shard.ops) != {Op.EMBEDDING}:
        _check_insisted(shard, spec, target.insisted)
    resident = choice.resident
    if first.ordered:
        resident = (*resident, ("perm", ResidentTensor((rows,), PERM_DTYPE).nbytes))
    if shard.biased:
        resident = (*resident, ("bias", shard.n * target.act_dtype.itemsize))
    if shard.experts is not None:
        resident = tuple((name, size * shard.count) for name, size in resident)
    return LayerPlan(
        shard=shard,
        formats=layer_formats,
        ordered=first.ordered,
        uses=choice.uses,
        resident=resident,
    )


@functools.lru_cache(maxsize=16)
def target_problems(target: Target) -> tuple[Problem, ...]:
    """What stands against every layer alike: the device, the activations' dtype, vLLM's mode."""
    device = f"device {target.device.name}"
    reasons = of_device(target.device, target.act_dtype)
    problems = [Problem(device, *reason) for reason in reasons]
    if target.device.kind == "hip" and not reasons and not target.experimental:
        problem = Problem(
            layer=device,
            found=f"AMD {target.device.arch}, for which kernels were compiled and never run",
            supported=SUPPORTED_DEVICES,
            fix='set "device": "experimental" in additional-config "fusedq" '
            "(--experimental-device of the fusedq commands), or serve without "
            "--quantization fusedq",
        )
        return (*problems, problem)
    kernels = catalogue.kernels_for(target.device)
    if target.insisted is not None:
        kernels = (KERNELS[target.insisted],)
    elif target.device.kind == "cpu" and not target.device.cpu_isa:
        problem = Problem(
            layer=device,
            found="no C++ compiler, and no cpu-fused compiled for this CPU",
            supported="g++ 12 and newer, or the compiler that CXX names",
            fix="install one (Debian: apt-get install g++), or set the slow kernel "
            '"cpu-striped" in additional-config "fusedq"',
        )
        return (*problems, problem)
    if target.policy.batch_invariant and not any(each.batch_invariant for each in kernels):
        invariant = (each.name for each in KERNELS.values() if each.batch_invariant)
        here = ", ".join(each.name for each in kernels)
        problem = Problem(
            layer=device,
            found=f"kernels without vLLM's batch-invariant mode ({here})",
            supported=", ".join(invariant),
            fix="unset VLLM_BATCH_INVARIANT, or choose one of these",
        )
        problems.append(problem)
    return tuple(problems)


class _Choice(NamedTuple):
    reasons: tuple[Reason, ...]
    uses: tuple[Use, ...] = ()
    resident: tuple[tuple[str, int], ...] = ()


# A model has a handful of shapes, repeated in every block and on every rank.
@functools.lru_cache(maxsize=1024)
def _choose(
    ops: tuple[Op, ...], size: tuple[int, int, int], spec: QuantSpec, phase: int, target: Target
) -> _Choice:
    """What stands against a shard of `size` N, resident rows and K, else its uses and bytes."""
    (n, rows, k), device, act_dtype = size, target.device, target.act_dtype
    if reasons := [_nowhere(op, device) for op in ops if not catalogue.kernels_for(device, op)]:
        return _Choice(tuple(reasons))
    *others, main = (_kernel(op, spec.weight_type, target) for op in ops)
    # What the others refuse is of layouts in which they would keep a weight themselves
    if reasons := catalogue.refusals(main, n, rows, spec, phase):
        return _Choice(reasons)
    layout = main.layout(spec.weight_type)
    uses = []
    for op, kernel in zip(ops, (*others, main), strict=True):
        # A lookup adds nothing up, so that a policy has nothing to say of it
        policy = DEFAULT_POLICY if op is Op.EMBEDDING else target.policy
        call = Call(kernel.name, layout, spec, n, rows, phase, k, act_dtype, policy)
        uses.append(Use.of(call, device, op))
    tensors = resident_tensors(layout, n, rows, spec, phase, act_dtype)
    resident = tuple((name, tensor.nbytes) for name, tensor in tensors.items())
    return _Choice((), tuple(uses), resident)


def _kernel(op: Op, weight_type: WeightType, target: Target) -> catalogue.Kernel:
    """The kernel that was insisted on where it is one for this, else that of the device."""
    insisted = None if target.insisted is None else KERNELS[target.insisted]
    if insisted is not None and insisted.implements(op) and weight_type in insisted.layouts:
        return insisted
    return catalogue.kernel_for(target.device, weight_type, op)


def _nowhere(op: Op, device: DeviceSpec) -> Reason:
    found = f"quantized {op} on device {device.name}, for which there is no kernel"
    able = sorted({each.device for each in KERNELS.values() if each.implements(op)})
    return Reason(found, f"devices {', '.join(able)}", "serve this model on such a device")


def _check_insisted(shard: LayerShard, spec: QuantSpec, insisted: str | None) -> None:
    if insisted is None:
        return
    if Op.EXPERTS in shard.ops and not KERNELS[insisted].implements(Op.EXPERTS):
        raise PreflightError.single(
            layer=shard.name,
            found=f"quantized experts for kernel {insisted}",
            supported=", ".join(k.name for k in KERNELS.values() if k.implements(Op.EXPERTS)),
            fix=_OTHER_KERNEL,
        )
    if spec.weight_type in KERNELS[insisted].layouts:
        return
    types = [each.value for each in KERNELS[insisted].layouts]
    raise PreflightError.single(
        layer=shard.name,
        found=f"{spec.weight_type.value} weights for kernel {insisted}",
        supported=", ".join(types),
        fix=_OTHER_KERNEL,
    )
