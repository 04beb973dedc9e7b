"""Runs every launch that a model can reach once, so that nothing is compiled while serving."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fusedq_kernels import heuristics
from fusedq_kernels.op import matmul
from fusedq_kernels.types import DeviceSpec, GemmShape, KernelName, Launch, PackedWeight

# Above so many tokens a launch depends on how many tiles of at least 16 tokens there are.
_EVERY_COUNT = 64
_STEP = 16


@dataclass(frozen=True, slots=True)
class WarmUp:
    """`launches` kernels ran once each, in `seconds`."""

    seconds: float
    launches: int


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer's resident weight, the kernel that its plan names, and whether it adds a bias."""

    packed: PackedWeight
    kernel: KernelName
    has_bias: bool


def warm_up(
    layers: Iterable[LoadedLayer], device: DeviceSpec, act_dtype: torch.dtype, max_tokens: int
) -> WarmUp:
    """Run each distinct launch of `layers` for 1 to `max_tokens` tokens, on zeros.

    Layers of one shape and scheme share their launches. In Triton's interpreter there is nothing to
    compile, and nothing is run.
    """
    start = time.perf_counter()
    distinct: dict[object, LoadedLayer] = {}
    for layer in layers:
        packed = layer.packed
        key = (packed.spec, packed.n, packed.k, packed.phase, packed.perm is None)
        distinct.setdefault((*key, layer.kernel, layer.has_bias), layer)
    count = 0
    for layer in distinct.values():
        where = layer.packed.qweight.device
        if layer.kernel is KernelName.TRITON_GEMM and where.type == "cpu":
            continue
        for tokens in launch_tokens(layer.packed, device, max_tokens):
            # A row-parallel layer adds its bias on the first rank only
            for has_bias in {False, layer.has_bias}:
                _run(layer, tokens, act_dtype, has_bias)
                count += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return WarmUp(time.perf_counter() - start, count)


def launch_tokens(packed: PackedWeight, device: DeviceSpec, max_tokens: int) -> list[int]:
    """For each launch that up to `max_tokens` tokens can select, the fewest tokens that do."""
    few = range(1, min(max_tokens, _EVERY_COUNT) + 1)
    many = range(_EVERY_COUNT + 1, max_tokens + 1, _STEP)
    first: dict[Launch, int] = {}
    for tokens in (*few, *many):
        shape = GemmShape(tokens, packed.n, packed.k)
        first.setdefault(heuristics.select(shape, packed.spec, device), tokens)
    return list(first.values())


def _run(layer: LoadedLayer, tokens: int, act_dtype: torch.dtype, has_bias: bool) -> None:
    packed = layer.packed
    features = packed.k if packed.perm is None else packed.in_features
    x = torch.zeros(tokens, features, dtype=act_dtype, device=packed.qweight.device)
    bias = x.new_zeros(packed.n) if has_bias else None
    matmul(x, packed, bias, layer.kernel)
