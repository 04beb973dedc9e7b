"""What each block of a decoder keeps of a sequence on one rank, in bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.attention import head_dim, kv_heads, model_type, setting
from vllm_fusedq.plan.layer_kinds import Kind, layer_kinds
from vllm_fusedq.plan.states import State, state_of

# It has a latent's sizes in its config and caches whole heads
_NO_LATENT_CACHE = frozenset({"minicpm3"})
# Llama 4's, where config.json leaves it out
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values of one layer, `token_bytes` per token: of every token, of a sliding `window`,
    or of a `chunk` that begins anew at its multiples."""

    token_bytes: int
    window: int | None = None
    chunk: int | None = None

    @property
    def kept(self) -> int | None:
        """Tokens before those that are computed; None: all."""
        return self.window - 1 if self.window is not None else self.chunk


Cache = Keys | State


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """What each block keeps; `unmodelled` as in `LayerKinds`, with the states of no known size."""

    blocks: tuple[tuple[Cache, ...], ...]
    unmodelled: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[int, Cache]]:
        """Every cache with its block's number."""
        return ((i, cache) for i, caches in enumerate(self.blocks) for cache in caches)


def layer_caches(
    checkpoint: Checkpoint, blocks: int, tp_size: int, kv_bytes: int, act_bytes: int, on_cpu: bool
) -> LayerCaches | None:
    """The caches of a decoder of `blocks` blocks; None where its config does not give the sizes.

    Args:
        checkpoint: its model's config.
        blocks: of the decoder, on all pipeline stages.
        tp_size: ranks that share the heads; fewer key and value heads than ranks are replicated.
        kv_bytes: bytes of one cached key or value element.
        act_bytes: bytes of one element of the activations.
        on_cpu: vLLM's CPU backend holds recurrent states at float32.
    """
    kinds = layer_kinds(checkpoint, blocks)
    unmodelled = list(kinds.unmodelled)
    stateful = [kind for kind in kinds.blocks if kind in (Kind.STATE, Kind.BOTH)]
    state = state_of(checkpoint, tp_size, act_bytes, on_cpu) if stateful else None
    if stateful and state is None:
        unmodelled.append(f"the states of {len(stateful)} layers")
    found = []
    for kind in kinds.blocks:
        caches: tuple[Cache, ...] = ()
        if kind in (Kind.EVERY, Kind.WINDOW, Kind.CHUNK, Kind.BOTH):
            keys = _keys(checkpoint, kind, tp_size, kv_bytes)
            if keys is None:
                return None
            caches += (keys,)
        if kind in (Kind.STATE, Kind.BOTH) and state is not None:
            caches += (state,)
        found.append(caches)
    if state is not None and not any(isinstance(c, Keys) for caches in found for c in caches):
        # Models without attention cache no prefixes
        found = [tuple(replace(state, copies=1) for _ in caches) for caches in found]
    return LayerCaches(tuple(found), tuple(unmodelled))


def _keys(checkpoint: Checkpoint, kind: Kind, tp_size: int, kv_bytes: int) -> Keys | None:
    rank = checkpoint.number("kv_lora_rank")
    if rank and model_type(checkpoint) not in _NO_LATENT_CACHE:
        # Multi-head latent attention: one latent for all heads, on every rank
        return Keys((rank + (checkpoint.number("qk_rope_head_dim") or 0)) * kv_bytes)
    heads, size = kv_heads(checkpoint), head_dim(checkpoint)
    if kind is Kind.EVERY and model_type(checkpoint) == "gemma4_text":
        size = checkpoint.number("global_head_dim") or 512
        if setting(checkpoint, "attention_k_eq_v"):
            heads = checkpoint.number("num_global_key_value_heads") or heads
    if not heads or not size:
        return None
    token_bytes = 2 * max(1, heads // tp_size) * size * kv_bytes
    if kind is Kind.CHUNK:
        return Keys(token_bytes, chunk=checkpoint.number("attention_chunk_size") or _CHUNK)
    return Keys(token_bytes, checkpoint.number("sliding_window") if kind is Kind.WINDOW else None)
