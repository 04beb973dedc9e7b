"""What config.json says of a model's attention heads, and what goes without saying there.

Published config.json files leave out what equals the default of the model's configuration class.
"""

from typing import Any

from vllm_fusedq.checkpoint.read import Checkpoint, config_sections

# As vLLM's ModelConfig reads them, in its order
KV_HEADS = (
    *("n_head_kv", "num_kv_heads", "num_key_value_heads"),
    *("multi_query_group_num", "num_attention_groups"),
)
_QUERY_HEADS = ("num_attention_heads", "n_head")
# (key and value heads, head_dim) of families whose small models leave them out
_DEFAULTS = {
    "gemma2": (4, 256),
    "gemma3_text": (4, 256),
    "gemma3n_text": (2, 256),
    "gemma4_text": (4, 256),
    "gpt_oss": (8, 64),
    "qwen3_next": (2, 256),
    "qwen3_5_text": (4, 256),
    "qwen3_5_moe_text": (2, 256),
}


def model_type(checkpoint: Checkpoint) -> str:
    """The configuration class of the language model, "" where config.json names none."""
    return str(config_sections(checkpoint.config)[-1].get("model_type") or "")


def setting(checkpoint: Checkpoint, key: str, default: Any = None) -> Any:
    """The first value of `key` in the model's config that is not null."""
    found = (section.get(key) for section in config_sections(checkpoint.config))
    return next((value for value in found if value is not None), default)


def kv_heads(checkpoint: Checkpoint) -> int | None:
    """Key and value heads of a layer on all ranks; None where config.json does not tell."""
    # Falcon's newer architecture ignores the flag
    if setting(checkpoint, "multi_query") and not setting(checkpoint, "new_decoder_architecture"):
        return 1
    if (stated := checkpoint.number(*KV_HEADS, "num_attention_heads")) is not None:
        return stated
    return _DEFAULTS.get(model_type(checkpoint), (None, None))[0]


def head_dim(checkpoint: Checkpoint) -> int | None:
    """Elements of one head; None where config.json does not tell."""
    if (stated := checkpoint.number("head_dim")) is not None:
        return stated
    if (known := _DEFAULTS.get(model_type(checkpoint))) is not None:
        return known[1]
    heads, hidden = checkpoint.number(*_QUERY_HEADS), checkpoint.number("hidden_size")
    return heads and hidden and hidden // heads
