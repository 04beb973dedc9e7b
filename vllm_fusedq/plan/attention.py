"""What config.json says of a model's attention: its heads, and what is no full attention."""

from collections import Counter
from typing import Any

from vllm_fusedq.checkpoint.read import Checkpoint, config_sections

# As vLLM's ModelConfig reads them, in its order
_KV_HEADS = (
    *("n_head_kv", "num_kv_heads", "num_key_value_heads"),
    *("multi_query_group_num", "num_attention_groups"),
)
# One name per layer; models with none of these lists say it by a period or an index
_LAYER_LISTS = ("layer_types", "layers_block_type")
_FULL_ATTENTION = frozenset(
    {
        *("attention", "full_attention", "indexed_attention"),
        *("deepseek_sparse_attention", "qwen_sparse_attention"),
    }
)
_WINDOWS = ("sliding_window", "attention_chunk_size")
_MIXED_LAYERS = (
    *("attn_layer_indices", "attn_layer_period", "attn_type_list", "block_configs"),
    *("cross_attention_layers", "full_attention_interval", "full_attn_idxs"),
    *("hybrid_layer_ids", "hybrid_override_pattern", "layer_group_size", "linear_attn_config"),
    *("mamba_d_ssm", "mamba_d_state", "mamba_step"),
)


def kv_heads(checkpoint: Checkpoint) -> int | None:
    """Key and value heads of a layer on all ranks; None where config.json does not tell."""
    # Falcon's newer architecture ignores the flag
    if _first(checkpoint, "multi_query") and not _first(checkpoint, "new_decoder_architecture"):
        return 1
    return checkpoint.number(*_KV_HEADS, "num_attention_heads")


def partial_attention(checkpoint: Checkpoint, length: int | None) -> list[str]:
    """What keeps less than the keys and values of every token of `length`, in every layer.

    Empty where each layer does; `length` None is longer than any window.
    """
    layers = next((each for key in _LAYER_LISTS if (each := _first(checkpoint, key))), None)
    if isinstance(layers, list):
        kinds = Counter(str(kind) for kind in layers if kind not in _FULL_ATTENTION)
        found = [f"{kind} in {count} of {len(layers)} layers" for kind, count in kinds.items()]
    else:
        found = [key for key in _MIXED_LAYERS if _first(checkpoint, key)]
        if _first(checkpoint, "use_sliding_window") is not False:
            found += [
                f"{key} {size}"
                for key in _WINDOWS
                if (size := checkpoint.number(key)) and (length is None or size < length)
            ]
    if shared := checkpoint.number("num_kv_shared_layers"):
        found.append(f"{shared} layers that share the keys and values of others")
    found += [f"{key} by layer" for key in _KV_HEADS if isinstance(_first(checkpoint, key), list)]
    return found


def _first(checkpoint: Checkpoint, key: str) -> Any:
    found = (section.get(key) for section in config_sections(checkpoint.config))
    return next((value for value in found if value is not None), None)
