"""Which slice of a module a rank holds."""

import pytest

from vllm_fusedq.formats import Region
from vllm_fusedq.sharding import (
    ParallelStyle,
    UnevenSplit,
    even_slice,
    head_slice,
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
