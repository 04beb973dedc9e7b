"""Runs what a layer can reach before it serves, so that no request waits for a compiler.

A launch depends on the number of tokens; a kernel's record lists those of a layer and each runs
once here, on zeros. The first launch also allocates the counters of split-K, which must not happen
while a CUDA graph is captured.
"""

from collections.abc import Iterable

import torch

from fusedq_kernels import ops
from fusedq_kernels.catalogue import Kernel, Op
from fusedq_kernels.types import DEFAULT_POLICY, DeviceSpec, PackedWeight, Policy


def warm_up(
    kernel: Kernel,
    packed: PackedWeight,
    device: DeviceSpec,
    act_dtype: torch.dtype,
    max_tokens: int,
    *,
    with_bias: Iterable[bool] = (False,),
    policy: Policy = DEFAULT_POLICY,
) -> int:
    """Run every launch of one kernel for one layer once; returns how many there were.

    Args:
        kernel: what runs the layer.
        packed: its weight.
        device: what the launches are chosen for.
        act_dtype: dtype of the activations.
        max_tokens: the most tokens of one call.
        with_bias: whether calls pass a bias; a rank may do both, in turn.
        policy: of the launches.
    """
    if kernel.op is Op.EMBEDDING:
        ids = torch.zeros(1, dtype=torch.int64, device=packed.qweight.device)
        ops.embedding(ids, packed, kernel.name, act_dtype)
        return 1
    like = {"dtype": act_dtype, "device": packed.qweight.device}
    launches = kernel.launches(packed.n, packed.k, packed.spec, device, max_tokens, policy)
    count = 0
    for has_bias in set(with_bias):
        bias = torch.zeros(packed.n, **like) if has_bias else None
        for m, launch in launches:
            ops.run(torch.zeros((m, packed.k), **like), packed, bias, launch)
            count += 1
    return count
