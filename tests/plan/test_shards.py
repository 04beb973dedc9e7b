"""Which slice of a module a rank holds."""

import pytest

from vllm_fusedq.formats import Region
from vllm_fusedq.plan.shards import (
    ParallelStyle,
    PartShard,
    UnevenSplit,
    even_slice,
    head_slice,
    partition_parts,
    shard_module,
    style_of,
)


def test_even_slices_cover_everything_once() -> None:
    assert [even_slice(896, 4, rank, "in_features") for rank in range(4)] == [
        (0, 224),
        (224, 448),
        (448, 672),
        (672, 896),
    ]


def test_uneven_slice_is_refused_with_the_numbers() -> None:
    with pytest.raises(UnevenSplit, match="896 in_features cannot be cut into 3 equal parts"):
        even_slice(896, 3, 0, "in_features")


@pytest.mark.parametrize(
    ("heads", "tp_size", "expected"),
    [
        (4, 2, [(0, 64), (64, 128)]),
        (2, 4, [(0, 64), (0, 64), (64, 128), (64, 128)]),
        (1, 2, [(0, 128), (0, 128)]),
    ],
)
def test_head_slices_replicate_whole_heads(
    heads: int, tp_size: int, expected: list[tuple[int, int]]
) -> None:
    assert [head_slice(128, heads, tp_size, rank) for rank in range(tp_size)] == expected


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnevenSplit, match="3 key/value heads cannot be replicated over 4 ranks"):
        head_slice(96, 3, 4, 0)


def test_style_follows_the_last_name() -> None:
    assert style_of("model.layers.0.mlp.down_proj") is ParallelStyle.ROW
    assert style_of("model.layers.0.self_attn.o_proj") is ParallelStyle.ROW
    assert style_of("model.layers.0.mlp.up_proj") is ParallelStyle.COLUMN
    assert style_of("model.layers.0.self_attn.q_a_proj") is ParallelStyle.REPLICATED


@pytest.mark.parametrize(
    ("module", "style", "region"),
    [
        ("a.down_proj", ParallelStyle.ROW, Region(0, 256, 64, 128)),
        ("a.up_proj", ParallelStyle.COLUMN, Region(128, 256, 0, 128)),
        ("a.k_proj", ParallelStyle.COLUMN, Region(0, 256, 0, 128)),
        ("a.fc", ParallelStyle.REPLICATED, Region(0, 256, 0, 128)),
    ],
)
def test_shard_module(module: str, style: ParallelStyle, region: Region) -> None:
    part = shard_module(module, None, 256, 128, style, tp_size=2, tp_rank=1, kv_heads=1)
    assert part.region == region


def regions(parts: tuple[PartShard, ...]) -> list[tuple[str, object, Region]]:
    return [(part.module, part.shard_id, part.region) for part in parts]


def test_partitions_of_query_key_and_value_on_rank_3_of_4_with_2_kv_heads() -> None:
    parts, totals = partition_parts(
        {"q": 512, "k": 128, "v": 128},
        [128, 64, 64],
        256,
        ParallelStyle.COLUMN,
        4,
        3,
        kv_replicas=2,
    )
    assert regions(parts) == [
        ("q", "q", Region(384, 512, 0, 256)),
        ("k", "k", Region(64, 128, 0, 256)),
        ("v", "v", Region(64, 128, 0, 256)),
    ]
    assert totals == {"q": 512, "k": 128, "v": 128}


def test_partitions_that_the_checkpoint_stores_as_one_follow_each_other() -> None:
    parts, totals = partition_parts({"gate_up": 128}, [32, 32], 64, ParallelStyle.COLUMN, 2, 1)
    assert regions(parts) == [
        ("gate_up", 0, Region(32, 64, 0, 64)),
        ("gate_up", 1, Region(96, 128, 0, 64)),
    ]
    assert totals == {"gate_up": 128}


def test_a_partition_of_in_features() -> None:
    parts, totals = partition_parts({"down": 64}, [64], 48, ParallelStyle.ROW, 2, 1)
    assert regions(parts) == [("down", None, Region(0, 64, 48, 96))]
    assert totals == {"down": 64}


def test_partitions_of_which_one_module_holds_some_and_another_the_rest() -> None:
    """Qwen3.5: query, key and value in one module, z in another, all in one layer of vLLM."""
    stored = {"in_proj_qkv": 64, "in_proj_z": 32}
    parts, totals = partition_parts(stored, [8, 8, 16, 16], 48, ParallelStyle.COLUMN, 2, 1)
    assert regions(parts) == [
        ("in_proj_qkv", 0, Region(8, 16, 0, 48)),
        ("in_proj_qkv", 1, Region(24, 32, 0, 48)),
        ("in_proj_qkv", 2, Region(48, 64, 0, 48)),
        ("in_proj_z", 3, Region(16, 32, 0, 48)),
    ]
    assert totals == stored


def test_a_replicated_layer_is_whole_on_every_rank() -> None:
    parts, totals = partition_parts({"gate": 64}, [64], 48, ParallelStyle.REPLICATED, 4, 3)
    assert regions(parts) == [("gate", None, Region(0, 64, 0, 48))]
    assert totals == {"gate": 64}
