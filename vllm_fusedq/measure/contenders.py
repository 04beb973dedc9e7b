"""What is timed on one layer: our kernel, the unquantized layer, plain reading."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fusedq_kernels import ops  # noqa: F401  (registers the operators)
from fusedq_kernels.call import Call
from fusedq_kernels.layouts.packing import pack, weight_bytes
from fusedq_kernels.types import PackedWeight
from vllm_fusedq.measure.random_weights import random_tokens, random_weight
from vllm_fusedq.measure.timing import Timing, by_turns, copies_for, measure

READ, DENSE, FUSED = "read", "unquantized", "fused"
# Of all copies of a weight on a CPU: more than the last cache of most. `MAX_COPIES` of a small one
# are less, and leave it to the reading in each round.
COLD_BYTES, MAX_COPIES = 100e6, 64
READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
# `run(x, out)` multiplies [M, K] tokens into [M, N]
Run = Callable[[torch.Tensor, torch.Tensor], object]


@dataclass(frozen=True)
class Contender:
    """`runs` are equal but for their copy of the weight, of `bytes` each, metadata included."""

    name: str
    runs: Sequence[Run]
    bytes: float


def copies(size: float, device: torch.device) -> range:
    """For each copy of a weight of `size` bytes that it takes to find none in a cache."""
    if device.type == "cuda":
        return range(copies_for(int(size), device))
    return range(min(MAX_COPIES, max(2, math.ceil(COLD_BYTES / size))))


def reading(device: torch.device) -> Contender:
    """A sum over more than any cache holds: what the device reads in a second."""
    big = torch.ones(READ_BYTES[device.type] // 4, device=device)
    return Contender(READ, [lambda x, out: big.sum()], big.nbytes)


def dense(n: int, k: int, dtype: torch.dtype, device: torch.device, name: str = DENSE) -> Contender:
    """The layer unquantized, as PyTorch multiplies by it."""
    size = n * k * dtype.itemsize
    first = random_tokens(n, k, dtype, device)
    weights = [first.clone() for _ in copies(size, device)]
    linear = torch.nn.functional.linear
    return Contender(name, [lambda x, out, w=w: linear(x, w) for w in weights], size)


def packed_for(call: Call, device: torch.device, ordered: bool = False) -> PackedWeight:
    """A random weight as `call` has it resident, its rows in a random order where `ordered`."""
    logical = random_weight(call.n, call.k, call.spec, device, phase=call.phase)
    if ordered:
        perm = torch.randperm(call.k, device=device) % call.in_features
        logical = replace(logical, perm=perm.int(), in_features=call.in_features)
    return pack(logical, call.layout, call.dtype.torch)


def cold(packed: PackedWeight) -> list[PackedWeight]:
    """As many copies of a weight as it takes to find none in a cache."""
    size = sum(weight_bytes(packed).values())
    return [_copy(packed) for _ in copies(size, packed.qweight.device)]


def fused(call: Call, weights: Sequence[PackedWeight], name: str = FUSED) -> Contender:
    """Our operator, called as a model calls it, on copies of one weight."""
    size = sum(weight_bytes(weights[0]).values())
    multiply, text = torch.ops.fusedq.matmul_out, call.text

    def of(one: PackedWeight) -> Run:
        weight = (one.qweight, one.scales, one.zeros, None, one.perm, text)
        return lambda x, out: multiply(out, x, *weight)

    return Contender(name, [of(each) for each in weights], size)


def _copy(packed: PackedWeight) -> PackedWeight:
    zeros = None if packed.zeros is None else packed.zeros.clone()
    return replace(
        packed, qweight=packed.qweight.clone(), scales=packed.scales.clone(), zeros=zeros
    )


def timed(
    contenders: Sequence[Contender],
    x: torch.Tensor,
    n: int,
    rounds: int,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Times of one layer's contenders with tokens x [M, K], by name."""
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    calls = {each.name: [partial(run, x, out) for run in each.runs] for each in contenders}
    if x.is_cuda:
        return {name: measure(each, x.device) for name, each in calls.items()}
    return by_turns(calls, rounds, seconds)
