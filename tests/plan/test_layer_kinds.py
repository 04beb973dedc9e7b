"""What layers keep by rules that no vLLM model was built for, and what is said of no rule.

`test_kv_pool.py` compares the rules with vLLM's own models.
"""

from typing import Any

import pytest

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.layer_kinds import Kind, layer_kinds

EVERY, WINDOW, STATE, NOTHING = Kind.EVERY, Kind.WINDOW, Kind.STATE, Kind.NOTHING


def kinds(config: dict[str, Any], blocks: int = 4) -> tuple[list[Kind], list[str]]:
    found = layer_kinds(Checkpoint("model", config, {}, "quantization_config", {}), blocks)
    return list(found.blocks), list(found.unmodelled)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [EVERY] * 4),
        # Qwen2.5 names a window and does not use it, Qwen3 only where it is told
        (
            {"model_type": "qwen2", "sliding_window": 16384, "use_sliding_window": False},
            [EVERY] * 4,
        ),
        ({"model_type": "qwen3", "sliding_window": 4096}, [EVERY] * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            [EVERY, EVERY, EVERY, WINDOW],
        ),
        ({"model_type": "mistral", "sliding_window": None}, [EVERY] * 4),
        ({"model_type": "phi3", "sliding_window": 2047}, [WINDOW] * 4),
        (
            {"layer_types": ["full_attention"] * 4, "sliding_window": 4096, "model_type": "gemma2"},
            [EVERY] * 4,
        ),
        (
            {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
            [STATE, EVERY, NOTHING, NOTHING],
        ),
        ({"model_type": "cohere2", "sliding_window": 4096}, [WINDOW, WINDOW, WINDOW, EVERY]),
        ({"model_type": "bamba", "attn_layer_indices": [1]}, [STATE, EVERY, STATE, STATE]),
        ({"num_kv_shared_layers": 1}, [EVERY, EVERY, EVERY, NOTHING]),
        ({"text_config": {"model_type": "falcon_mamba"}}, [STATE] * 4),
    ],
)
def test_what_a_block_keeps(config: dict[str, Any], expected: list[Kind]) -> None:
    assert kinds(config) == (expected, [])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sliding_window": 4096}, ["sliding_window 4096"]),
        ({"full_attention_interval": 4}, ["full_attention_interval"]),
        ({"attn_layer_period": 8, "mamba_d_state": 16}, ["attn_layer_period", "mamba_d_state"]),
        ({"layer_types": ["full_attention", "new_attention"] * 2}, ["new_attention in 2 layers"]),
        ({"num_key_value_heads": [4, 2]}, ["num_key_value_heads by layer"]),
        ({"kv_lora_rank": 512, "index_topk": 2048}, ["the index of sparse attention"]),
    ],
)
def test_what_no_rule_is_known_for_counts_as_every_token_and_is_said(
    config: dict[str, Any], said: list[str]
) -> None:
    assert kinds(config) == ([EVERY] * 4, said)
