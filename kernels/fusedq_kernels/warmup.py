"""Runs what a layer can reach before it serves, so that no request waits for a compiler.

A launch depends on the number of tokens; a kernel's record lists those of a layer and each runs
once here, on zeros. The first launch also allocates the counters of split-K, which must not happen
while a CUDA graph is captured. Of a weight of device meta each launch is compiled, none runs.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fusedq_kernels import ops
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.catalogue import Kernel, Op
from fusedq_kernels.choose.experts import ExpertsLaunch, Load
from fusedq_kernels.experts import Stack
from fusedq_kernels.prepared import prepared
from fusedq_kernels.types import DEFAULT_POLICY, DeviceSpec, Launch, PackedWeight, Policy


class Reached(NamedTuple):
    """A launch of a layer, the fewest tokens that reach it, and whether it adds a bias."""

    launch: Launch
    tokens: int
    has_bias: bool = False

    def __str__(self) -> str:
        """ "triton-gemm 16x64, 2 splits, 4 warps, 3 stages (rule: ..) with 9 tokens and a bias"."""
        words = f"{self.launch.kernel} ({self.launch.source})"
        if (tile := self.launch.tile) is not None:
            parts = tile.split_k * tile.segments
            words = (
                f"{self.launch.kernel} {tile.block_m}x{tile.block_n}, "
                f"{parts} split{'s' * (parts != 1)}, "
                f"{tile.num_warps} warps, {tile.num_stages} stages ({self.launch.source})"
            )
        bias = "a bias" if self.has_bias else "no bias"
        return f"{words} with {self.tokens} token{'s' * (self.tokens != 1)} and {bias}"


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


def run_experts_once(
    kernel: Kernel,
    call: ExpertsCall,
    w13: Stack,
    w2: Stack,
    load: Load,
    launch: ExpertsLaunch,
    is_mapped: bool,
) -> None:
    """Run one of `Kernel.expert_launches` on zeros, or only compile it for stacks of device meta.

    Args:
        kernel: what runs the experts.
        call: theirs.
        w13, w2: their weights, with whatever bias and perm will be there.
        load: the fewest tokens that reach the launch.
        launch: tiles of both products.
        is_mapped: whether calls pass an expert map.
    """
    like, shape = {"device": w13.qweight.device}, (load.tokens, load.top_k)
    x = torch.zeros((load.tokens, call.up.in_features), dtype=call.up.dtype.torch, **like)
    weights, ids = torch.zeros(shape, **like), torch.zeros(shape, dtype=torch.int32, **like)
    places = torch.zeros(load.all_experts, dtype=torch.int32, **like) if is_mapped else None
    out = torch.zeros((load.tokens, call.down.n), dtype=x.dtype, **like)
    run = kernel.prepare_expert_pass(call, launch, load.top_k)
    run(x, weights, ids, places, w13, w2, out)
