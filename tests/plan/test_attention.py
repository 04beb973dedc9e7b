"""Heads and kinds of attention by the published config.json of models that differ in them."""

from typing import Any

import pytest

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.attention import kv_heads, partial_attention


def checkpoint(config: dict[str, Any]) -> Checkpoint:
    return Checkpoint("model", config, {}, "quantization_config", {})


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, 8),
        ({"num_attention_heads": 32}, 32),
        ({"text_config": {"num_attention_heads": 16, "num_key_value_heads": 8}}, 8),
        # Falcon-7B, Falcon-40B, ChatGLM3, GPT-BigCode
        ({"num_attention_heads": 71, "multi_query": True, "new_decoder_architecture": False}, 1),
        (
            {
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "multi_query": True,
                "new_decoder_architecture": True,
            },
            8,
        ),
        ({"num_attention_heads": 32, "multi_query_group_num": 2}, 2),
        ({"n_head": 48, "multi_query": True}, 1),
        ({}, None),
    ],
)
def test_key_and_value_heads(config: dict[str, Any], heads: int | None) -> None:
    assert kv_heads(checkpoint(config)) == heads


GEMMA_3 = ["sliding_attention"] * 5 + ["full_attention"]
QWEN_3_NEXT = (["linear_attention"] * 3 + ["full_attention"]) * 2


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, []),
        ({"layer_types": ["full_attention"] * 4, "sliding_window": 4096}, []),
        # Qwen2.5 names a window and does not use it; Phi-3's is longer than its sequences
        ({"sliding_window": 16384, "use_sliding_window": False}, []),
        ({"sliding_window": 262144}, []),
        ({"sliding_window": None, "attention_chunk_size": None}, []),
        ({"sliding_window": 4096}, ["sliding_window 4096"]),
        ({"attention_chunk_size": 8192}, ["attention_chunk_size 8192"]),
        (
            {"text_config": {"layer_types": GEMMA_3, "sliding_window": 1024}},
            ["sliding_attention in 5 of 6 layers"],
        ),
        ({"layer_types": QWEN_3_NEXT}, ["linear_attention in 6 of 8 layers"]),
        ({"layers_block_type": ["mamba", "attention"]}, ["mamba in 1 of 2 layers"]),
        ({"full_attention_interval": 4}, ["full_attention_interval"]),
        ({"attn_layer_period": 8, "mamba_d_state": 16}, ["attn_layer_period", "mamba_d_state"]),
        ({"hybrid_override_pattern": "M-M*-"}, ["hybrid_override_pattern"]),
        (
            {"num_kv_shared_layers": 15},
            ["15 layers that share the keys and values of others"],
        ),
        ({"num_key_value_heads": [4, 2]}, ["num_key_value_heads by layer"]),
    ],
)
def test_what_keeps_less_than_every_token(config: dict[str, Any], found: list[str]) -> None:
    assert partial_attention(checkpoint(config), 131072) == found


def test_a_window_counts_for_longer_sequences_only() -> None:
    mistral = checkpoint({"sliding_window": 4096})
    assert partial_attention(mistral, 4096) == []
    assert partial_attention(mistral, 4097) == partial_attention(mistral, None) != []
