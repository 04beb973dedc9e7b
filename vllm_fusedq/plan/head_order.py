"""Query, key and value rows that a checkpoint stores head group by head group.

vLLM's layer wants all query heads, then all key heads, then all value heads, and the model's own
code reorders an unquantized `weight` on its way there. A quantized module is taken as it is stored:
each part of the layer becomes the ranges of rows that hold it, so that codes, scales and zero
points follow alike in every format.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from vllm_fusedq.formats.layer import Region
from vllm_fusedq.plan.shards import QKV_SHARD_IDS, PartShard, even_slice, head_slice


@dataclass(frozen=True, slots=True)
class HeadOrder:
    """`groups` times: `queries` query heads, a key head and a value head of `head_size` rows."""

    groups: int
    queries: int
    head_size: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of all query, all key and all value heads."""
        each = self.groups * self.head_size
        return self.queries * each, each, each

    def stored_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The rows that hold `[start, stop)` of vLLM's order, as few ranges as possible."""
        ranges: list[tuple[int, int]] = []
        row = start
        while row < stop:
            end = min(row - row % self.head_size + self.head_size, stop)
            first = self._stored(row)
            last = first + end - row
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]
            ranges.append((first, last))
            row = end
        return ranges

    def stored_parts(self, parts: Iterable[PartShard]) -> tuple[PartShard, ...]:
        """The parts of a layer in vLLM's order, each as the ranges of rows that hold it."""
        return tuple(
            replace(part, region=replace(part.region, n_start=start, n_stop=stop))
            for part in parts
            for start, stop in self.stored_ranges(part.region.n_start, part.region.n_stop)
        )

    def shard(self, module: str, k: int, tp_size: int, tp_rank: int) -> tuple[PartShard, ...]:
        """The rank's part of one module with `k` in_features, heads replicated as vLLM does.

        Raises:
            UnevenSplit: the heads can be neither cut nor replicated.
        """
        return self.stored_parts(
            PartShard(module, shard_id, Region(start, stop, 0, k))
            for shard_id, start, stop in self._rows_of(tp_size, tp_rank)
        )

    def _rows_of(self, tp_size: int, tp_rank: int) -> Iterator[tuple[str | int, int, int]]:
        before = 0
        for index, (shard_id, size) in enumerate(zip(QKV_SHARD_IDS, self.sizes, strict=True)):
            if index:
                start, stop = head_slice(size, self.groups, tp_size, tp_rank)
            else:
                start, stop = even_slice(size, tp_size, tp_rank, "out_features of query heads")
            yield shard_id, before + start, before + stop
            before += size

    def _stored(self, row: int) -> int:
        head, inside = divmod(row, self.head_size)
        if head < self.groups * self.queries:
            group, place = divmod(head, self.queries)
        else:
            kind, group = divmod(head - self.groups * self.queries, self.groups)
            place = self.queries + kind
        return (group * (self.queries + 2) + place) * self.head_size + inside
