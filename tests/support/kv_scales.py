"""KV-cache scales beside quantized layers, in every spelling that vLLM reads."""

from typing import Any

import torch

from checkpoints import Edit, Tensors

SCHEME: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
    "scale_dtype": None,
    "zp_dtype": None,
    "observer": "static_minmax",
    "observer_kwargs": {},
}
"""`kv_cache_scheme` as llm-compressor writes it for `num_bits: 8, type: float`."""

SPELLINGS = {
    "llm-compressor": ("self_attn.k_scale", "self_attn.v_scale"),
    "vllm": ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    "modelopt": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "fused": ("self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale"),
    "fused twice": ("self_attn.qkqkv_proj.k_scale", "self_attn.qkqkv_proj.v_scale"),
    "cache": ("self_attn.k_cache.scale", "self_attn.v_cache.scale"),
    "fp8": ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    "shared": ("self_attn.kv_scale",),
}
"""Names below a block; "shared" is one scale for both."""


def kv_scales(
    *scales: tuple[float, float], spelling: str = "llm-compressor", dtype: Any = torch.float32
) -> Edit:
    """Add the (k, v) scales of each block in turn; "shared" stores the first of each pair."""

    def edit(tensors: Tensors) -> None:
        for block, pair in enumerate(scales):
            for name, scale in zip(SPELLINGS[spelling], pair, strict=False):
                tensors[f"model.layers.{block}.{name}"] = torch.tensor([scale], dtype=dtype)

    return edit
