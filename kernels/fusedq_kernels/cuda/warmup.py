"""Compiles what a layer can reach before it serves, so that no request waits for a compiler.

A launch depends on the number of tokens; `heuristics.reachable_launches` lists those of a layer and
each runs once here, on zeros. The first launch also allocates the counters of split-K, which must
not happen while a CUDA graph is captured.
"""

from collections.abc import Iterable

import torch

from fusedq_kernels import launchers
from fusedq_kernels.choose.heuristics import reachable_launches
from fusedq_kernels.types import DeviceSpec, PackedWeight


def warm_up(
    packed: PackedWeight,
    device: DeviceSpec,
    act_dtype: torch.dtype,
    max_tokens: int,
    *,
    with_bias: Iterable[bool] = (False,),
    batch_invariant: bool = False,
    sliced_prefill: bool = False,
) -> int:
    """Run every launch of one layer once; returns how many there were.

    Args:
        packed: a weight in its tiled layout.
        device: what `heuristics.select` is asked for.
        act_dtype: dtype of the activations.
        max_tokens: the most tokens of one call.
        with_bias: whether calls pass a bias; a rank may do both, in turn.
        batch_invariant, sliced_prefill: as in `heuristics.select`.
    """
    launches = reachable_launches(
        *(packed.n, packed.k, packed.spec, device, max_tokens),
        batch_invariant=batch_invariant,
        sliced_prefill=sliced_prefill,
    )
    like = {"dtype": act_dtype, "device": packed.qweight.device}
    count = 0
    for has_bias in set(with_bias):
        bias = torch.zeros(packed.n, **like) if has_bias else None
        for m, launch in launches:
            launchers.run(torch.zeros((m, packed.k), **like), packed, bias, launch)
            count += 1
    return count
