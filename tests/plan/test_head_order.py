"""Rows stored in head groups, against the splits of transformers' own attention modules."""

import pytest
import torch
from transformers import BloomConfig, FalconConfig
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention

from vllm_fusedq.formats import Region
from vllm_fusedq.plan.head_order import HeadOrder
from vllm_fusedq.plan.shards import PartShard, UnevenSplit

HEAD = 16


def falcon_rows(heads: int, kv_heads: int) -> list[torch.Tensor]:
    """The stored rows of query, key and value, by what transformers makes of row numbers."""
    multi_query = kv_heads == 1
    config = FalconConfig(
        hidden_size=heads * HEAD,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        new_decoder_architecture=not multi_query and kv_heads < heads,
        multi_query=multi_query,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        attention = FalconAttention(config, layer_idx=0)
    rows = torch.arange((heads + 2 * kv_heads) * HEAD)[None, None]
    query, key, value = (part.reshape(-1, HEAD) for part in attention._split_heads(rows))
    # New decoder blocks repeat each key and value head for the query heads of its group
    key, value = (part[:: len(part) // kv_heads] for part in (key, value))
    return [part.flatten() for part in (query, key, value)]


def bloom_rows(heads: int) -> list[torch.Tensor]:
    with torch.device("meta"):
        attention = BloomAttention(BloomConfig(hidden_size=heads * HEAD, n_head=heads), layer_idx=0)
    rows = torch.arange(3 * heads * HEAD)[None, None]
    return [part.flatten() for part in attention._reshape(rows)]


def stored_rows(parts: tuple[PartShard, ...], shard_id: str) -> torch.Tensor:
    ranges = [part.region for part in parts if part.shard_id == shard_id]
    return torch.cat([torch.arange(region.n_start, region.n_stop) for region in ranges])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 1), (4, 4), (6, 3), (16, 8)])
def test_falcon_rows(heads: int, kv_heads: int) -> None:
    order = HeadOrder(kv_heads, heads // kv_heads, HEAD)
    parts = order.shard("qkv", 64, 1, 0)
    for shard_id, expected in zip("qkv", falcon_rows(heads, kv_heads), strict=True):
        assert torch.equal(stored_rows(parts, shard_id), expected)
    assert {part.module for part in parts} == {"qkv"}
    assert {(part.region.k_start, part.region.k_stop) for part in parts} == {(0, 64)}


def test_bloom_rows_are_groups_of_one_query_head() -> None:
    parts = HeadOrder(4, 1, HEAD).shard("qkv", 64, 1, 0)
    for shard_id, expected in zip("qkv", bloom_rows(4), strict=True):
        assert torch.equal(stored_rows(parts, shard_id), expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"), [(4, 2, 2), (8, 2, 4), (8, 4, 2), (8, 8, 8), (4, 1, 2)]
)
def test_ranks_hold_their_heads_and_replicate_those_of_keys(
    heads: int, kv_heads: int, tp_size: int
) -> None:
    order = HeadOrder(kv_heads, heads // kv_heads, HEAD)
    query, key, value = (rows.reshape(-1, HEAD) for rows in falcon_rows(heads, kv_heads))
    for rank in range(tp_size):
        parts = order.shard("qkv", 64, tp_size, rank)
        own = heads // tp_size
        assert torch.equal(stored_rows(parts, "q"), query[rank * own : (rank + 1) * own].flatten())
        own = max(kv_heads // tp_size, 1)
        first = rank * kv_heads // tp_size
        for shard_id, rows in (("k", key), ("v", value)):
            assert torch.equal(stored_rows(parts, shard_id), rows[first : first + own].flatten())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnevenSplit, match="out_features of query heads cannot be cut into 3"):
        HeadOrder(2, 2, HEAD).shard("qkv", 64, 3, 0)


def test_ranges_are_as_few_as_possible() -> None:
    order = HeadOrder(2, 2, HEAD)
    part = PartShard("qkv", "q", Region(0, 4 * HEAD, 0, 64))
    ranges = [(p.region.n_start, p.region.n_stop) for p in order.stored_parts([part])]
    assert ranges == [(0, 32), (64, 96)]
    assert order.stored_ranges(8, 40) == [(8, 32), (64, 72)]
    assert HeadOrder(1, 4, HEAD).stored_ranges(0, 4 * HEAD) == [(0, 64)]
