"""Runs every launch that a model can reach once, so that nothing is compiled while serving."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fusedq_kernels.op import matmul
from fusedq_kernels.types import GatherName, KernelName, PackedWeight
from vllm_fusedq.plan.layer import Target


@dataclass(frozen=True, slots=True)
class WarmUp:
    """`launches` kernels ran once each, in `seconds`."""

    seconds: float
    launches: int


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer's resident weight, what its plan names, and whether it adds a bias."""

    packed: PackedWeight
    kernel: KernelName | GatherName
    has_bias: bool
    gather: GatherName | None = None


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
        distinct.setdefault((*key, layer.kernel, layer.has_bias, layer.gather), layer)
    count = sum(_run(layer, target, max_tokens) for layer in distinct.values())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return WarmUp(time.perf_counter() - start, count)


def _run(layer: LoadedLayer, target: Target, max_tokens: int) -> int:
    launches = 0
    if layer.gather is not None:
        launches += _look_up(layer.packed, layer.gather, target)
    if layer.kernel is not layer.gather:
        launches += _multiply(layer, target, max_tokens)
    return launches


def _look_up(packed: PackedWeight, gather: GatherName, target: Target) -> int:
    if gather is GatherName.TRITON_GATHER and not packed.qweight.is_cuda:
        return 0
    from fusedq_kernels.embedding import embedding

    ids = torch.zeros(1, dtype=torch.int64, device=packed.qweight.device)
    embedding(ids, packed, gather, target.act_dtype.torch)
    return 1


def _multiply(layer: LoadedLayer, target: Target, max_tokens: int) -> int:
    # A row-parallel layer adds its bias on the first rank only.
    with_bias = {False, layer.has_bias}
    packed = layer.packed
    if layer.kernel is KernelName.TRITON_GEMM:
        if not packed.qweight.is_cuda:
            return 0
        from fusedq_kernels.cuda.warmup import warm_up as compile_launches

        return compile_launches(
            *(packed, target.device, target.act_dtype.torch, max_tokens),
            with_bias=with_bias,
            batch_invariant=target.batch_invariant,
            sliced_prefill=target.sliced_prefill,
        )
    features = packed.k if packed.perm is None else packed.in_features
    x = torch.zeros(1, features, dtype=target.act_dtype.torch, device=packed.qweight.device)
    for has_bias in with_bias:
        matmul(x, packed, x.new_zeros(packed.n) if has_bias else None, layer.kernel)
    return len(with_bias)
