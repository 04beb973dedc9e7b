"""Heads by the published config.json of models that differ in them."""

from typing import Any

import pytest

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.attention import head_dim, kv_heads


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
        # Gemma 3 4B leaves its heads to its configuration class
        ({"text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}, 4),
        ({}, None),
    ],
)
def test_key_and_value_heads(config: dict[str, Any], heads: int | None) -> None:
    assert kv_heads(checkpoint(config)) == heads


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"head_dim": 128, "hidden_size": 1024, "num_attention_heads": 16}, 128),
        ({"hidden_size": 4096, "num_attention_heads": 32}, 128),
        ({"hidden_size": 4544, "n_head": 71}, 64),
        ({"text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}, 256),
        ({"hidden_size": 4096}, None),
    ],
)
def test_elements_of_a_head(config: dict[str, Any], size: int | None) -> None:
    assert head_dim(checkpoint(config)) == size
