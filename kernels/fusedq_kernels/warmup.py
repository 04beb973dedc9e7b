"""Runs what a layer can reach before it serves, so that no request waits for a compiler.

A launch depends on the number of tokens; a kernel's record lists those of a layer and each runs
once here, on zeros. The first launch also allocates the counters of split-K, which must not happen
while a CUDA graph is captured. Of a weight of device meta each launch is compiled, none runs.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fusedq_kernels import ops
from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import Kernel, Op
from fusedq_kernels.choose.experts import ExpertsLaunch
from fusedq_kernels.experts import ResidentExperts
from fusedq_kernels.prepared import prepared
from fusedq_kernels.types import (
    DEFAULT_POLICY,
    DeviceSpec,
    Launch,
    PackedWeight,
    Policy,
    TileConfig,
)


class Reached(NamedTuple):
    """A launch of a layer, the fewest tokens that reach it, and whether it adds a bias."""

    launch: Launch
    tokens: int
    has_bias: bool = False

    def __str__(self) -> str:
        """ "triton-gemm 16x64, 2 splits, 4 warps, 3 stages (rule: ..) with 9 tokens and a bias"."""
        words = f"{self.launch.kernel} ({self.launch.source})"
        if (tile := self.launch.tile) is not None:
            words = f"{self.launch.kernel} {_told(tile)} ({self.launch.source})"
        bias = "a bias" if self.has_bias else "no bias"
        return f"{words} with {_counted(self.tokens)} and {bias}"


class ReachedExperts(NamedTuple):
    """A launch of a layer's experts, and the fewest and the most tokens that reach it."""

    kernel: str
    tokens: int
    most: int
    launch: ExpertsLaunch

    def __str__(self) -> str:
        """ "triton-gemm 8x128, .. up and 8x64, .. down (rule: ..) with 9 tokens"."""
        launch = self.launch
        tiles = f"{_told(launch.up)} up and {_told(launch.down)} down"
        return f"{self.kernel} {tiles} ({launch.source}) with {_counted(self.tokens)}"


def _told(tile: TileConfig) -> str:
    parts = tile.split_k * tile.segments
    return (
        f"{tile.block_m}x{tile.block_n}, {parts} split{'s' * (parts != 1)}, "
        f"{tile.num_warps} warps, {tile.num_stages} stages"
    )


def _counted(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens != 1)}"


def reachable(
    kernel: Kernel,
    packed: PackedWeight,
    device: DeviceSpec,
    max_tokens: int,
    *,
    with_bias: Iterable[bool] = (False,),
    policy: Policy = DEFAULT_POLICY,
) -> Iterator[Reached]:
    """Every launch of one kernel for one layer.

    Args:
        kernel: what runs the layer.
        packed: its weight.
        device: what the launches are chosen for.
        max_tokens: the most tokens of one call.
        with_bias: whether calls pass a bias; a rank may do both, in turn.
        policy: of the launches.
    """
    if kernel.op is Op.EMBEDDING:
        yield Reached(Launch(kernel.name, None, f"rule: {kernel.device}"), 1)
        return
    launches = kernel.launches(packed.n, packed.k, packed.spec, device, max_tokens, policy)
    for has_bias in sorted(set(with_bias)):
        for tokens, launch in launches:
            yield Reached(launch, tokens, has_bias)


def run_once(
    reached: Reached, kernel: Kernel, packed: PackedWeight, act_dtype: torch.dtype
) -> None:
    """Run one launch on zeros, or only compile it where `packed` is of device meta."""
    like = {"dtype": act_dtype, "device": packed.qweight.device}
    if kernel.op is Op.EMBEDDING:
        run = prepared(Call.of(packed, kernel.name, act_dtype).text).launched(kernel.name, None)
        ids = torch.zeros(reached.tokens, dtype=torch.int64, device=packed.qweight.device)
        rows = torch.zeros((reached.tokens, packed.k), **like)
        run(ids, packed.qweight, packed.scales, packed.zeros, packed.perm, rows)
        return
    bias = torch.zeros(packed.n, **like) if reached.has_bias else None
    ops.run(torch.zeros((reached.tokens, packed.k), **like), packed, bias, reached.launch)


def reachable_experts(
    resident: ResidentExperts, device: DeviceSpec, max_tokens: int
) -> Iterator[ReachedExperts]:
    """Every launch of a layer's experts for 1 to `max_tokens` tokens."""
    sizes = (resident.call, resident.top_k, resident.all_experts)
    for served in resident.kernel.expert_launches(*sizes, device, max_tokens):
        yield ReachedExperts(resident.kernel.name, *served)


def run_experts_once(reached: ReachedExperts, resident: ResidentExperts) -> None:
    """Run one launch on its fewest tokens, zeros, or only compile it for stacks of device meta."""
    call, tokens = resident.call, reached.tokens
    like, shape = {"device": resident.w13.qweight.device}, (tokens, resident.top_k)
    x = torch.zeros((tokens, call.up.in_features), dtype=call.up.dtype.torch, **like)
    weights = torch.zeros(shape, dtype=torch.float32, **like)
    ids = torch.zeros(shape, dtype=torch.int32, **like)
    places = None
    if resident.places is not None:
        places = torch.zeros(resident.places, dtype=torch.int32, **like)
    out = torch.zeros((tokens, call.down.n), dtype=x.dtype, **like)
    run = resident.kernel.prepare_expert_pass(call, reached.launch, resident.top_k)
    run(x, weights, ids, places, resident.w13, resident.w2, out)
