"""Runs every launch that a model can reach once, so that nothing is compiled while serving."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fusedq_kernels import warmup
from fusedq_kernels.types import PackedWeight
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.uses import Use


@dataclass(frozen=True, slots=True)
class WarmUp:
    """`launches` kernels ran once each, in `seconds`."""

    seconds: float
    launches: int


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer's resident weight, the uses that its plan names, and whether it adds a bias."""

    packed: PackedWeight
    uses: tuple[Use, ...]
    has_bias: bool


def warm_up(layers: Iterable[LoadedLayer], target: Target, max_tokens: int) -> WarmUp:
    """Run each distinct launch of `layers` for 1 to `max_tokens` tokens, on zeros.

    Layers of one shape and scheme share their launches. In Triton's interpreter there is nothing to
    compile, and nothing is run.
    """
    start = time.perf_counter()
    distinct: dict[object, LoadedLayer] = {}
    for layer in layers:
        packed = layer.packed
        key = (packed.spec, packed.n, packed.k, packed.phase, packed.perm is None)
        kernels = tuple(use.call.kernel for use in layer.uses)
        distinct.setdefault((*key, kernels, layer.has_bias), layer)
    count = sum(_run(layer, target, max_tokens) for layer in distinct.values())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return WarmUp(time.perf_counter() - start, count)


def _run(layer: LoadedLayer, target: Target, max_tokens: int) -> int:
    return sum(
        warmup.warm_up(
            *(use.kernel, layer.packed, target.device, target.act_dtype.torch, max_tokens),
            # A row-parallel layer adds its bias on the first rank only.
            with_bias={False, layer.has_bias},
            policy=target.policy,
        )
        for use in layer.uses
        if use.kernel.device == layer.packed.qweight.device.type
    )
