"""The rule that decides: one layer's shard on one device becomes a `LayerPlan`, or is refused.

`model.py` (checkpoint headers, no vLLM) and the vLLM linear method (real partition sizes) both
ask `plan_layer`, so the pre-flight verdict is the runtime verdict.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusedq_kernels import catalogue
from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS, Op
from fusedq_kernels.choose import heuristics
from fusedq_kernels.choose.refusals import of_device
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.resident import PERM_DTYPE, ResidentTensor, resident_tensors
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    DeviceSpec,
    GemmShape,
    Launch,
    Layout,
    Policy,
    QuantSpec,
    Reason,
)
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.ordering import resident_rows, resident_spec
from vllm_fusedq.plan.shards import LayerShard

DECODE_TOKENS = 1
PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Target:
    """Where a plan is for: the device decides the kernels, the dtype what they multiply by.

    A layer that the kernel `insisted` on cannot run is refused; None lets the device decide for
    each layer. A torch dtype may be given as `act_dtype` and is kept by name.
    """

    device: DeviceSpec
    act_dtype: DType
    insisted: str | None = None
    policy: Policy = DEFAULT_POLICY

    def __post_init__(self) -> None:
        object.__setattr__(self, "act_dtype", DType.of(self.act_dtype))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one rank runs one vLLM linear layer or embedding.

    `spec`, `phase` and `rows` (along K) are those of the resident weight. Where `ordered`, the
    activation is gathered into `rows` features once before the kernel. `resident` is the bytes of
    each tensor that stays in memory, by `PackedWeight` field name. `declared` is what else than
    `kernel` some number of tokens reaches, with its workspace; `scratch_bytes` is the most that
    splits of K store in one call. `gather` looks up the rows of an embedding; it is `kernel` too
    unless the embedding is also the lm_head.
    """

    shard: LayerShard
    formats: tuple[LayerFormat, ...]
    spec: QuantSpec
    phase: int
    rows: int
    ordered: bool
    kernel: str
    decode: Launch
    prefill: Launch
    resident: tuple[tuple[str, int], ...]
    declared: heuristics.DeclaredLaunch | None = None
    gather: str | None = None
    scratch_bytes: int = 0

    @property
    def prefix(self) -> str:
        return self.shard.prefix

    @property
    def n(self) -> int:
        return self.shard.n

    @property
    def k(self) -> int:
        return self.shard.k

    @property
    def kernel_name(self) -> str:
        """Like "cpu-wna16", "cpu-gather" or, of a tied embedding, "cpu-gather + cpu-wna16"."""
        if self.gather in (None, self.kernel):
            return self.kernel
        return f"{self.gather} + {self.kernel}"

    @property
    def layout(self) -> Layout:
        """The layout of the resident weight; `gather` reads it too."""
        return KERNELS[self.kernel].layout(self.spec.weight_type)

    def call(self, kernel: str, target: Target) -> Call:
        """What the operators are told of this layer, for one of its kernels."""
        size = (self.n, self.rows, self.phase, self.k)
        policy = target.policy if KERNELS[kernel].op is Op.MATMUL else DEFAULT_POLICY
        return Call(kernel, self.layout, self.spec, *size, target.act_dtype, policy)

    @property
    def weight_bytes(self) -> int:
        return dict(self.resident)["qweight"]

    @property
    def metadata_bytes(self) -> int:
        """Scales, zero points and activation order."""
        return sum(size for _, size in self.resident) - self.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Resident bits, padding and metadata included, per weight of this rank's shard."""
        return 8 * sum(size for _, size in self.resident) / (self.n * self.k)


def plan_layer(
    shard: LayerShard, formats: Mapping[str, LayerFormat | None], target: Target
) -> LayerPlan:
    """Plan one layer's shard.

    Args:
        shard: what the rank holds.
        formats: for each part's module, how the checkpoint stores it; None if unquantized.
        target: device, activation dtype, insisted kernel.

    Raises:
        PreflightError: every reason why no fused kernel can run this shard.
    """
    layer_formats = _of_one_scheme(shard, formats)
    if problems := target_problems(target):
        raise PreflightError(problems)
    first, region = layer_formats[0], shard.parts[0].region
    if first.ordered:
        rows, spec, phase = resident_rows(first, region), resident_spec(first, region), 0
    else:
        rows, spec, phase = shard.k, first.spec, region.k_start % first.spec.group_size
    op = Op.MATMUL if shard.multiplied else Op.EMBEDDING
    choice = _choose((shard.n, rows), spec, phase, target, op)
    if choice.reasons:
        # One module may hold several parts
        full = " + ".join(f"[{layer.n}, {layer.k}]" for layer in dict.fromkeys(layer_formats))
        where = f"{full} full, [{shard.n}, {shard.k}] per rank at tensor_parallel_size "
        where += str(shard.tp_size)
        layer = f"{shard.prefix} (out_features x in_features {where})"
        raise PreflightError([Problem(layer, *reason) for reason in choice.reasons])
    decode, prefill = choice.launches
    gather = None
    if shard.gathered:
        gather = catalogue.kernel_for(target.device, spec.weight_type, Op.EMBEDDING).name
    if shard.multiplied:
        _check_insisted(shard, spec, target.insisted)
    resident = choice.resident
    if first.ordered:
        resident = (*resident, ("perm", ResidentTensor((rows,), PERM_DTYPE).nbytes))
    return LayerPlan(
        shard=shard,
        formats=layer_formats,
        spec=spec,
        phase=phase,
        rows=rows,
        ordered=first.ordered,
        kernel=decode.kernel,
        decode=decode,
        prefill=prefill,
        resident=resident,
        declared=choice.declared,
        gather=gather,
        scratch_bytes=choice.scratch_bytes,
    )


@functools.lru_cache(maxsize=16)
def target_problems(target: Target) -> tuple[Problem, ...]:
    """What stands against every layer alike: the device, the activations' dtype, vLLM's mode."""
    device = f"device {target.device.name}"
    reasons = of_device(target.device, target.act_dtype)
    problems = [Problem(device, *reason) for reason in reasons]
    kernels = catalogue.kernels_for(target.device)
    if target.policy.batch_invariant and not any(each.batch_invariant for each in kernels):
        invariant = (each.name for each in KERNELS.values() if each.batch_invariant)
        here = ", ".join(each.name for each in kernels)
        problem = Problem(
            layer=device,
            found=f"kernels without vLLM's batch-invariant mode ({here})",
            supported=", ".join(invariant),
            fix="unset VLLM_BATCH_INVARIANT, or serve on a GPU",
        )
        problems.append(problem)
    return tuple(problems)


class _Choice(NamedTuple):
    reasons: tuple[Reason, ...]
    launches: tuple[Launch, ...] = ()
    resident: tuple[tuple[str, int], ...] = ()
    declared: heuristics.DeclaredLaunch | None = None
    scratch_bytes: int = 0


# A model has a handful of shapes, repeated in every block and on every rank.
@functools.lru_cache(maxsize=1024)
def _choose(size: tuple[int, int], spec: QuantSpec, phase: int, target: Target, op: Op) -> _Choice:
    """What stands against a shard, else its launches for decode and prefill and its bytes."""
    (n, rows), device, act_dtype = size, target.device, target.act_dtype
    kernel = catalogue.kernel_for(device, spec.weight_type, op)
    if reasons := catalogue.refusals(kernel, n, rows, spec, phase):
        return _Choice(reasons)
    launches = tuple(
        kernel.launch(GemmShape(m, n, rows), spec, device, target.policy)
        for m in (DECODE_TOKENS, PREFILL_TOKENS)
    )
    declared = kernel.beside(n, rows, spec, device, target.policy)
    scratch = kernel.most_scratch(n, rows, spec, device, target.policy)
    form = kernel.layout(spec.weight_type)
    tensors = resident_tensors(form, n, rows, spec, phase, act_dtype)
    resident = tuple((name, tensor.nbytes) for name, tensor in tensors.items())
    return _Choice((), launches, resident, declared, scratch)


def _check_insisted(shard: LayerShard, spec: QuantSpec, insisted: str | None) -> None:
    if insisted is None or spec.weight_type in KERNELS[insisted].layouts:
        return
    types = [each.value for each in KERNELS[insisted].layouts]
    raise PreflightError.single(
        layer=shard.prefix,
        found=f"{spec.weight_type.value} weights for kernel {insisted}",
        supported=", ".join(types),
        fix='choose another "kernel" in additional-config "fusedq", or leave it out',
    )


def _of_one_scheme(
    shard: LayerShard, formats: Mapping[str, LayerFormat | None]
) -> tuple[LayerFormat, ...]:
    """All parts' formats: a fused layer never mixes schemes silently."""
    found = [(part.module, formats[part.module]) for part in shard.parts]
    specs = {(layer.spec, layer.ordered) if layer else None for _, layer in found}
    if len(specs) > 1 or None in specs:
        listing = ", ".join(
            f"{module.rpartition('.')[2]} {layer.description if layer else 'unquantized'}"
            for module, layer in found
        )
        raise PreflightError.single(
            layer=shard.prefix,
            found=f"parts with different schemes in one fused layer ({listing})",
            supported="one scheme for all parts that vLLM fuses into a layer",
            fix="quantize the model again with these modules alike, or with all of them "
            f"excluded{_by_exclusion(found)}",
        )
    layers = tuple(layer for _, layer in found if layer is not None)
    if len({layer.k for layer in layers}) > 1:
        sizes = ", ".join(
            f"{layer.module.rpartition('.')[2]} [{layer.n}, {layer.k}]" for layer in layers
        )
        raise PreflightError.single(
            layer=shard.prefix,
            found=f"parts with different in_features in one fused layer ({sizes})",
            supported="parts [out_features, in_features] of one activation",
            fix="download the checkpoint again or quantize the model again",
        )
    return layers


def _by_exclusion(found: Sequence[tuple[str, LayerFormat | None]]) -> str:
    names = {layer.exclusion for _, layer in found if layer is not None}
    return f" by {names.pop()}" if len(names) == 1 else ""
