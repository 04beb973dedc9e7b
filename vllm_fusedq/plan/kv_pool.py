"""How vLLM's pool of equal blocks holds the caches of a sequence: `get_kv_cache_groups` of its
`v1/core/kv_cache_utils.py`, for the layouts in which a layer's blocks lie together.

Layers of one kind share a table of blocks. Where kinds differ, all layers get pages of one size and
the groups one length, which pads some: a sequence takes the bytes of the longest group for each
block of each group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from vllm_fusedq.plan.layer_caches import Cache, Keys, LayerCaches
from vllm_fusedq.plan.states import State


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """`tokens` of a block; `batches` in flight at once, each of which may hold its tokens in a
    window's blocks beside those of the window."""

    tokens: int
    batches: int


# FlashAttention's blocks and asynchronous scheduling; what vLLM takes on a CPU
GPU_POOL = PoolSettings(16, 2)
CPU_POOL = PoolSettings(128, 1)


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of one table: (block of the decoder, bytes of its pages), `tokens` in a page."""

    cache: Cache
    tokens: int
    pages: tuple[tuple[int, int], ...]

    def blocks(self, length: int, in_flight: int) -> int:
        """Pages of each layer for a sequence of `length` tokens."""
        if isinstance(self.cache, State):
            return self.cache.copies
        kept = self.cache.kept
        tokens = length if kept is None else min(kept + in_flight, length)
        # A window may begin inside a block
        return -(-tokens // self.tokens) + (self.cache.window is not None)


@dataclass(frozen=True, slots=True)
class Pool:
    """The tables of one model; a pipeline stage holds its blocks from `start` to before `stop`."""

    groups: tuple[Group, ...]

    def sequence_bytes(self, length: int, in_flight: int, start: int, stop: int) -> int:
        """What vLLM keeps ready on a stage for a sequence of `length` tokens."""
        blocks = sum(group.blocks(length, in_flight) for group in self.groups)
        return self._bytes_per_block(start, stop) * blocks

    def token_bytes(self, start: int, stop: int) -> int:
        """What another token of a long sequence takes, rounded up."""
        growing = (
            Fraction(1, group.tokens)
            for group in self.groups
            if isinstance(group.cache, Keys) and group.cache.kept is None
        )
        return -int(-self._bytes_per_block(start, stop) * sum(growing) // 1)

    def _bytes_per_block(self, start: int, stop: int) -> int:
        return max(
            (
                sum(page for index, page in group.pages if start <= index < stop)
                for group in self.groups
            ),
            default=0,
        )


def pool_of(caches: LayerCaches, tokens: int) -> Pool:
    """The tables that vLLM makes of a model's caches, with `tokens` in a block by default."""
    buckets: dict[Cache, list[int]] = {}
    for index, cache in caches:
        buckets.setdefault(cache, []).append(index)
    tokens = _aligned(list(buckets), tokens)
    if len({_table(cache) for cache in buckets}) <= 1:
        pages = [(i, _page(cache, tokens)) for cache, members in buckets.items() for i in members]
        return Pool(tuple(Group(cache, tokens, tuple(pages)) for cache in list(buckets)[:1]))
    page = max(_page(cache, tokens) for cache in buckets)
    sizes = [len(members) for members in buckets.values()]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    return Pool(
        tuple(
            Group(cache, _stretched(cache, tokens, page), tuple((i, page) for i in part))
            for cache, members in buckets.items()
            for part in _dealt(members, -(-len(members) // size))
        )
    )


def _aligned(caches: Sequence[Cache], tokens: int) -> int:
    """Attention's blocks where states lie in the same pool: their pages are as large as a state."""
    states = [cache.size for cache in caches if isinstance(cache, State)]
    keys = next((cache for cache in caches if isinstance(cache, Keys)), None)
    if not states or keys is None:
        return tokens
    return tokens * -(-max(states) // (tokens * keys.token_bytes))


def _table(cache: Cache) -> object:
    """Caches that are equal in this need as many blocks as each other."""
    return cache if isinstance(cache, State) else (cache.window, cache.chunk)


def _page(cache: Cache, tokens: int) -> int:
    return cache.size if isinstance(cache, State) else tokens * cache.token_bytes


def _stretched(cache: Cache, tokens: int, page: int) -> int:
    """More tokens in a smaller page where they fill the common one, else it is padded."""
    own = _page(cache, tokens)
    return tokens * (page // own) if isinstance(cache, Keys) and page % own == 0 else tokens


def _dealt(members: Sequence[int], groups: int) -> Iterator[Sequence[int]]:
    return (members[i::groups] for i in range(groups))
