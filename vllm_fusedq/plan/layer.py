"""The rule that decides: one layer's shard on one device becomes a `LayerPlan`, or is refused.

`model.py` (checkpoint headers, no vLLM) and the vLLM linear method (real partition sizes) both
ask `plan_layer`, so the pre-flight verdict is the runtime verdict.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusedq_kernels.choose import heuristics
from fusedq_kernels.choose.refusals import device_reasons, unsupported_reasons
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.resident import PERM_DTYPE, ResidentTensor, resident_tensors
from fusedq_kernels.types import (
    DeviceSpec,
    GatherName,
    GemmShape,
    KernelName,
    Launch,
    QuantSpec,
    Reason,
    WeightType,
    layout_for,
    runs,
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

    A layer that `insisted` cannot run is refused; None lets the device decide for each layer. With
    `batch_invariant` a row's bits do not depend on its batch. Without `sliced_prefill` no measured
    row may name sliced-cublas. A torch dtype may be given as `act_dtype` and is kept by name.
    """

    device: DeviceSpec
    act_dtype: DType
    insisted: KernelName | None = None
    batch_invariant: bool = False
    sliced_prefill: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "act_dtype", DType.of(self.act_dtype))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one rank runs one vLLM linear layer or embedding.

    `spec`, `phase` and `rows` (along K) are those of the resident weight. Where `ordered`, the
    activation is gathered into `rows` features once before the kernel. `resident` is the bytes of
    each tensor that stays in memory, by `PackedWeight` field name. `declared` is what else than
    `kernel` some number of tokens reaches, with its workspace; `partial_sum_bytes` is the most that
    splits of K store in one call. `gather` looks up the rows of an embedding; it is `kernel` too
    unless the embedding is also the lm_head.
    """

    shard: LayerShard
    formats: tuple[LayerFormat, ...]
    spec: QuantSpec
    phase: int
    rows: int
    ordered: bool
    kernel: KernelName | GatherName
    decode: Launch
    prefill: Launch
    resident: tuple[tuple[str, int], ...]
    declared: heuristics.DeclaredLaunch | None = None
    gather: GatherName | None = None
    partial_sum_bytes: int = 0

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
            return self.kernel.value
        return f"{self.gather.value} + {self.kernel.value}"

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
    gather = heuristics.gather_for(target.device) if shard.gathered else None
    choice = _choose((shard.n, rows), spec, phase, target, None if shard.multiplied else gather)
    if choice.reasons:
        # One module may hold several parts
        full = " + ".join(f"[{layer.n}, {layer.k}]" for layer in dict.fromkeys(layer_formats))
        where = f"{full} full, [{shard.n}, {shard.k}] per rank at tensor_parallel_size "
        where += str(shard.tp_size)
        layer = f"{shard.prefix} (out_features x in_features {where})"
        raise PreflightError([Problem(layer, *reason) for reason in choice.reasons])
    decode, prefill = choice.launches
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
        partial_sum_bytes=choice.partial_sum_bytes,
    )


@functools.lru_cache(maxsize=16)
def target_problems(target: Target) -> tuple[Problem, ...]:
    """What stands against every layer alike: the device, the activations' dtype, vLLM's mode."""
    device = f"device {target.device.name}"
    reasons = device_reasons(target.device, target.act_dtype)
    problems = [Problem(device, *reason) for reason in reasons]
    kernels = heuristics.kernels_for(target.device)
    if target.batch_invariant and not any(map(heuristics.is_batch_invariant, kernels)):
        invariant = (each.value for each in KernelName if heuristics.is_batch_invariant(each))
        here = ", ".join(each.value for each in kernels)
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
    partial_sum_bytes: int = 0


# A model has a handful of shapes, repeated in every block and on every rank.
@functools.lru_cache(maxsize=1024)
def _choose(
    size: tuple[int, int], spec: QuantSpec, phase: int, target: Target, gather: GatherName | None
) -> _Choice:
    """What stands against a shard, else its launches for decode and prefill and its bytes.

    With `gather` rows are looked up and never multiplied.
    """
    (n, rows), device, act_dtype = size, target.device, target.act_dtype
    if reasons := unsupported_reasons(n, rows, spec, phase, device, gather):
        return _Choice(reasons)
    declared, sums = None, 0
    if gather:
        launches = (heuristics.select_gather(device),) * 2
    else:
        launches = tuple(
            heuristics.select(
                *(GemmShape(m, n, rows), spec, device),
                batch_invariant=target.batch_invariant,
                sliced_prefill=target.sliced_prefill,
            )
            for m in (DECODE_TOKENS, PREFILL_TOKENS)
        )
        sums = heuristics.partial_sum_bytes(
            *(n, rows, spec, device), batch_invariant=target.batch_invariant
        )
        if target.sliced_prefill and not target.batch_invariant:
            declared = heuristics.declared_launch(n, rows, spec, device)
    form = layout_for(launches[0].kernel, spec.weight_type)
    tensors = resident_tensors(form, n, rows, spec, phase, act_dtype)
    resident = tuple((name, tensor.nbytes) for name, tensor in tensors.items())
    return _Choice((), launches, resident, declared, sums)


def _check_insisted(shard: LayerShard, spec: QuantSpec, kernel: KernelName | None) -> None:
    if kernel is None or runs(kernel, spec.weight_type):
        return
    types = [each.value for each in WeightType if runs(kernel, each)]
    raise PreflightError.single(
        layer=shard.prefix,
        found=f"{spec.weight_type.value} weights for kernel {kernel.value}",
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
