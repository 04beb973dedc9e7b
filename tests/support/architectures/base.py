"""A tiny model of one architecture, and sizes that many of them share."""

from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 128
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
BLOCKS = TOKENS | {"hidden_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": False}
HEADS = BLOCKS | {"num_attention_heads": 4}
GROUPED = HEADS | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512}
GPT = TOKENS | {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 256}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
TIED = {"tie_word_embeddings": True}
LATENT = {
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""Multi-head latent attention."""
DELTA = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
"""A block with gated delta networks before one with attention."""
BOTH = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A tiny model of transformers' `model_type`, quantized as the builder `build` does.

    Modules whose names hold one of `plain` are not quantized. `ranks` are the tensor-parallel sizes
    that are tested. `refused` is a part of the plugin's error, `fails` one of vLLM's own, without
    the plugin. `apart`: vLLM's unquantized model does not answer as transformers'. Where vLLM
    has it not `in_fp32` on CPUs, the reference is transformers' model. `dtype`: of activations.
    """

    model_type: str
    build: str
    settings: dict[str, Any]
    ranks: tuple[int, ...] = (1,)
    plain: tuple[str, ...] = ()
    refused: str = ""
    fails: str = ""
    apart: bool = False
    in_fp32: bool = True
    dtype: str = "bfloat16"

    @property
    def sees(self) -> bool:
        return "vision_config" in self.settings

    def config(self) -> PreTrainedConfig:
        return CONFIG_MAPPING[self.model_type](**self.settings)


def dense(model_type: str, build: str, *shared: dict[str, Any], **options: Any) -> Architecture:
    """A model with the sizes of `GROUPED`, replaced by `shared`; fields of `Architecture`."""
    settings = dict(GROUPED)
    for each in shared:
        settings |= each
    return Architecture(model_type=model_type, build=build, settings=settings, **options)


def bare(model_type: str, build: str, *shared: dict[str, Any], **options: Any) -> Architecture:
    """A model with the sizes of `shared` alone; fields of `Architecture`."""
    settings: dict[str, Any] = {}
    for each in shared:
        settings |= each
    return Architecture(model_type=model_type, build=build, settings=settings, **options)
