"""What each block of a decoder keeps of a sequence, by the model's config.

vLLM's models read a list with a name per layer (`layer_types`, `layers_block_type`) where there is
one, else the rule of their configuration class, which transformers writes down.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.attention import KV_HEADS, model_type, setting


class Kind(Enum):
    """Keys and values of every token, of a window or of a chunk; a state of one size; keys, values
    and a state; nothing."""

    EVERY = "every token"
    WINDOW = "window"
    CHUNK = "chunk"
    STATE = "state"
    BOTH = "every token and state"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """A kind per block; `unmodelled` says what was counted as every token because no rule is known
    for it, or was left out."""

    blocks: tuple[Kind, ...]
    unmodelled: tuple[str, ...] = ()


_NAMES = {
    **dict.fromkeys(("attention", "full_attention"), Kind.EVERY),
    **dict.fromkeys(("linear_attention", "mamba", "conv"), Kind.STATE),
    **dict.fromkeys(("moe", "mlp"), Kind.NOTHING),
    "sliding_attention": Kind.WINDOW,
    "chunked_attention": Kind.CHUNK,
}
_LAYER_LISTS = ("layer_types", "layers_block_type")
# Every so many blocks, by a key or by default, attend to all tokens; the others are of a kind
_PERIODS = {
    "gemma2": ("", 2, Kind.WINDOW),
    "gemma3_text": ("sliding_window_pattern", 6, Kind.WINDOW),
    "gemma3n_text": ("", 5, Kind.WINDOW),
    "gemma4_text": ("", 6, Kind.WINDOW),
    "cohere2": ("sliding_window_pattern", 4, Kind.WINDOW),
    "gpt_oss": ("", 2, Kind.WINDOW),
    "llama4_text": ("no_rope_layer_interval", 4, Kind.CHUNK),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        ("full_attention_interval", 4, Kind.STATE),
    ),
}
_ALL_OF_A_KIND = {
    "falcon_h1": Kind.BOTH,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), Kind.STATE),
}
_WINDOW_IN_ALL = frozenset({"mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
# `sliding_window` means nothing to them unless `use_sliding_window` is true
_WINDOW_IF_USED = ("qwen2", "qwen3", "smollm3")
_NEMOTRON = {"M": Kind.STATE, "*": Kind.EVERY, "-": Kind.NOTHING, "E": Kind.NOTHING}
# What tells that layers differ
_MIXED_LAYERS = (
    *("attn_layer_indices", "attn_layer_period", "attn_type_list", "block_configs"),
    *("cross_attention_layers", "full_attention_interval", "full_attn_idxs"),
    *("hybrid_layer_ids", "hybrid_override_pattern", "layer_group_size", "linear_attn_config"),
    *("mamba_d_ssm", "mamba_d_state", "mamba_step"),
)


def layer_kinds(checkpoint: Checkpoint, blocks: int) -> LayerKinds:
    """The kind of each of the decoder's `blocks`."""
    kinds, unmodelled = _own_kinds(checkpoint, blocks)
    shared = checkpoint.number("num_kv_shared_layers") or 0
    if shared:
        # They read the keys and values of an earlier block of their kind
        kinds = [*kinds[: blocks - shared], *[Kind.NOTHING] * min(shared, blocks)]
    if checkpoint.number("index_topk"):
        unmodelled.append("the index of sparse attention")
    unmodelled += [f"{k} by layer" for k in KV_HEADS if isinstance(setting(checkpoint, k), list)]
    return LayerKinds(tuple(kinds), tuple(unmodelled))


def _own_kinds(checkpoint: Checkpoint, blocks: int) -> tuple[list[Kind], list[str]]:
    name = model_type(checkpoint)
    if isinstance(names := _layer_list(checkpoint), list):
        return _named(names, blocks)
    if name in _PERIODS:
        key, default, other = _PERIODS[name]
        period = checkpoint.number(key) or default
        kinds = [Kind.EVERY if (i + 1) % period == 0 else other for i in range(blocks)]
        if name == "gemma4_text":
            kinds[-1:] = [Kind.EVERY]
        return kinds, []
    if name in _ALL_OF_A_KIND:
        return [_ALL_OF_A_KIND[name]] * blocks, []
    if rule := _RULES.get(name):
        return rule(checkpoint, blocks), []
    if mixed := [key for key in _MIXED_LAYERS if setting(checkpoint, key)]:
        return [Kind.EVERY] * blocks, mixed
    return _windowed(checkpoint, name, blocks)


def _layer_list(checkpoint: Checkpoint) -> object:
    return next((each for key in _LAYER_LISTS if (each := setting(checkpoint, key))), None)


def _named(names: Sequence[object], blocks: int) -> tuple[list[Kind], list[str]]:
    kinds = [_NAMES.get(str(name), Kind.EVERY) for name in names[:blocks]]
    unknown = dict.fromkeys(str(name) for name in names if str(name) not in _NAMES)
    unmodelled = [f"{name} in {sum(n == name for n in names)} layers" for name in unknown]
    return kinds + [Kind.EVERY] * (blocks - len(kinds)), unmodelled


def _windowed(checkpoint: Checkpoint, name: str, blocks: int) -> tuple[list[Kind], list[str]]:
    every = [Kind.EVERY] * blocks
    window = checkpoint.number("sliding_window")
    used = setting(checkpoint, "use_sliding_window")
    if window is None or used is False:
        return every, []
    if name in _WINDOW_IN_ALL:
        return [Kind.WINDOW] * blocks, []
    if name.startswith(_WINDOW_IF_USED):
        full = setting(checkpoint, "max_window_layers", 0) if used else blocks
        return every[:full] + [Kind.WINDOW] * (blocks - full), []
    return every, [f"sliding_window {window}"]


def _jamba(checkpoint: Checkpoint, blocks: int) -> list[Kind]:
    period = setting(checkpoint, "attn_layer_period", 8)
    offset = setting(checkpoint, "attn_layer_offset", 4)
    return [Kind.EVERY if i % period == offset else Kind.STATE for i in range(blocks)]


def _bamba(checkpoint: Checkpoint, blocks: int) -> list[Kind]:
    attention = setting(checkpoint, "attn_layer_indices", [])
    return [Kind.EVERY if i in attention else Kind.STATE for i in range(blocks)]


def _nemotron(checkpoint: Checkpoint, blocks: int) -> list[Kind]:
    pattern = str(setting(checkpoint, "hybrid_override_pattern", ""))
    kinds = [_NEMOTRON.get(letter, Kind.NOTHING) for letter in pattern[:blocks]]
    return kinds + [Kind.NOTHING] * (blocks - len(kinds))


_RULES: dict[str, Callable[[Checkpoint, int], list[Kind]]] = {
    "bamba": _bamba,
    "jamba": _jamba,
    "nemotron_h": _nemotron,
}
