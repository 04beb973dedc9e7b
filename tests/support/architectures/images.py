"""Models that also see images: the names of their language models have a prefix."""

from typing import Any

from architectures.base import BOTH, DELTA, GROUPED, SLIDING, TIED, Architecture

SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 256,
}


def sees(
    model_type: str,
    build: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    *shared: dict[str, Any],
    plain: tuple[str, ...] = ("vision_tower", "multi_modal_projector"),
    **options: Any,
) -> Architecture:
    """A model whose vision encoder stays unquantized."""
    settings = {"vision_config": vision, "text_config": GROUPED | text}
    for each in shared:
        settings |= each
    return Architecture(
        model_type=model_type, build=build, settings=settings, plain=plain, **options
    )


def rope(*sections: int, partial: float | None = None) -> dict[str, Any]:
    """Rotary positions of three coordinates."""
    found = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": found | ({"partial_rotary_factor": partial} if partial else {})}


UNTIED = {"tie_word_embeddings": False}
IMAGES = {
    "Gemma 3 with images": sees(
        "gemma3",
        "gptq-asym",
        SIGLIP,
        TIED | SLIDING | {"query_pre_attn_scalar": 64},
        {"mm_tokens_per_image": 4},
    ),
    "GLM-4V": sees(
        "glm4v",
        "ct-asym",
        QWEN | {"image_size": 28},
        rope(4, 6, 6, partial=0.5),
        plain=("visual",),
        apart=True,
    ),
    "Idefics 3": sees(
        "idefics3", "gptq-sym", SIGLIP, {"model_type": "llama"}, plain=("vision_model", "connector")
    ),
    "InternVL": sees(
        "internvl",
        "gptq-sym",
        SIGLIP | {"image_size": [28, 28], "patch_size": [14, 14]},
        {"model_type": "qwen2"},
        UNTIED,
    ),
    "LLaVA": sees(
        "llava",
        "awq",
        SIGLIP | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
        {"model_type": "llama"},
    ),
    "Mistral-Small 3": sees(
        "mistral3",
        "awq",
        SIGLIP | {"model_type": "pixtral", "head_dim": 32},
        {"model_type": "mistral"},
        UNTIED,
    ),
    "Qwen2-VL": sees(
        "qwen2_vl",
        "gptq-sym",
        {"depth": 1, "embed_dim": 64, "hidden_size": 256, "num_heads": 2},
        rope(8, 12, 12),
        plain=("visual",),
    ),
    "Qwen2.5-VL": sees(
        "qwen2_5_vl",
        "awq",
        QWEN | {"fullatt_block_indexes": [0]},
        rope(8, 12, 12),
        plain=("visual",),
        ranks=BOTH,
    ),
    "Qwen3-VL": sees(
        "qwen3_vl",
        "gptq-sym",
        QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        rope(8, 12, 12),
        plain=("visual",),
    ),
    "Qwen3.5 with images": sees(
        "qwen3_5",
        "ct-asym",
        QWEN | {"num_position_embeddings": 16},
        DELTA,
        plain=("visual", "in_proj_a", "in_proj_b"),
        in_fp32=False,
    ),
}
