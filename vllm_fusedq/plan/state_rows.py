"""Rows of a Mamba-2 layer's `in_proj` with one group of B and C, which every rank holds whole.

vLLM's mixer (`mamba_mixer2.py`) cuts the other rows by heads, and gives each rank all rows of B and
C where there are fewer groups than ranks; it knows that case with one group only.
"""

from dataclasses import dataclass

from vllm_fusedq.formats.layer import Region
from vllm_fusedq.plan.shards import PartShard, even_slice


@dataclass(frozen=True, slots=True)
class StateRows:
    """`inner` rows of the gate, as many of x, `states` of B and C together, `heads` of dt."""

    inner: int
    states: int
    heads: int

    def shard(self, module: str, k: int, tp_size: int, tp_rank: int) -> tuple[PartShard, ...]:
        """The rank's part of one module with `k` in_features.

        Raises:
            UnevenSplit: the heads cannot be cut.
        """
        parts, before, unit = [], 0, f"out_features ({self.heads} Mamba heads)"
        cut = ((self.inner, True), (self.inner, True), (self.states, False), (self.heads, True))
        for size, by_heads in cut:
            start, stop = even_slice(size, tp_size, tp_rank, unit) if by_heads else (0, size)
            parts.append(PartShard(module, None, Region(before + start, before + stop, 0, k)))
            before += size
        return tuple(parts)
