"""Published models whose layers keep different things of a sequence: sizes as in their config.json.

Only what decides the KV cache, and what vLLM needs to build the model around it. As published, some
leave out what their configuration class takes for unsaid.
"""

from typing import Any

Config = dict[str, Any]
_MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_QWEN_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_DELTA_NET = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}


def _of(architecture: str, model_type: str, sizes: tuple[int, int, int], **more: Any) -> Config:
    hidden, inner, layers = sizes
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": 1024,
        "max_position_embeddings": 131072,
        **more,
    }


def _heads(query: int, kv: int, dim: int | None = None) -> Config:
    heads = {"num_attention_heads": query, "num_key_value_heads": kv}
    return heads if dim is None else heads | {"head_dim": dim}


MODELS: dict[str, Config] = {
    "Llama-3.1-8B": _of("LlamaForCausalLM", "llama", (4096, 14336, 32), **_heads(32, 8)),
    "Mistral-7B-v0.1": _of(
        "MistralForCausalLM", "mistral", (4096, 14336, 32), sliding_window=4096, **_heads(32, 8)
    ),
    "Gemma-2-9B": _of(
        "Gemma2ForCausalLM", "gemma2", (3584, 14336, 42), sliding_window=4096, **_heads(16, 8, 256)
    ),
    "Gemma-3-4B": _of("Gemma3ForCausalLM", "gemma3_text", (2560, 10240, 34), sliding_window=1024),
    "Gemma-3-27B": _of(
        *("Gemma3ForCausalLM", "gemma3_text", (5376, 21504, 62)),
        sliding_window=1024,
        **_heads(32, 16, 128),
    ),
    "Gemma-3n-E4B": _of(
        *("Gemma3nForCausalLM", "gemma3n_text", (2048, 16384, 35)),
        sliding_window=512,
        num_kv_shared_layers=15,
        activation_sparsity_pattern=[0.0] * 35,
        **_heads(8, 2, 256),
    ),
    "Gemma-4-31B": _of(
        *("Gemma4ForCausalLM", "gemma4_text", (5376, 21504, 60)),
        sliding_window=1024,
        global_head_dim=512,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 10,
        **_heads(32, 16, 256),
    ),
    "gpt-oss-20b": _of(
        *("GptOssForCausalLM", "gpt_oss", (2880, 2880, 24)),
        sliding_window=128,
        num_local_experts=8,
        layer_types=["sliding_attention", "full_attention"] * 12,
        **_heads(64, 8, 64),
    ),
    "Llama-4-Scout": _of(
        *("Llama4ForCausalLM", "llama4_text", (5120, 8192, 48)),
        intermediate_size_mlp=16384,
        num_local_experts=4,
        attention_chunk_size=8192,
        **_heads(40, 8, 128),
    ),
    "DeepSeek-V3": _of(
        *("DeepseekV3ForCausalLM", "deepseek_v3", (7168, 18432, 61)),
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=3,
        **_heads(128, 128),
        **_MOE,
    ),
    "Qwen3-Next-80B": _of(
        *("Qwen3NextForCausalLM", "qwen3_next", (2048, 5120, 48)),
        **_heads(16, 2, 256),
        **_DELTA_NET,
        **_QWEN_MOE,
    ),
    "Qwen3.5-27B": _of(
        *("Qwen3_5ForCausalLM", "qwen3_5_text", (5120, 17408, 64)),
        mamba_ssm_dtype="float32",
        **_heads(24, 4, 256),
        **(_DELTA_NET | {"linear_num_value_heads": 48}),
    ),
    "Falcon-H1-34B": _of(
        *("FalconH1ForCausalLM", "falcon_h1", (5120, 21504, 72)),
        mamba_d_ssm=4096,
        mamba_n_heads=32,
        mamba_d_head=128,
        mamba_d_state=256,
        mamba_n_groups=2,
        mamba_d_conv=4,
        **_heads(20, 4, 128),
    ),
    "Granite-4.0-H-Tiny": _of(
        *("GraniteMoeHybridForCausalLM", "granitemoehybrid", (1536, 512, 40)),
        layer_types=["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        mamba_n_heads=48,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_expand=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=1024,
        position_embedding_type="nope",
        **_heads(12, 4),
    ),
    "Nemotron-H-8B": _of(
        *("NemotronHForCausalLM", "nemotron_h", (4096, 21504, 52)),
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        **_heads(32, 8, 128),
    ),
    "Jamba-v0.1": _of(
        *("JambaForCausalLM", "jamba", (4096, 14336, 32)),
        attn_layer_period=8,
        attn_layer_offset=4,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=256,
        num_experts=4,
        num_experts_per_tok=2,
        **_heads(32, 8),
    ),
    "LFM2-1.2B": _of(
        *("Lfm2ForCausalLM", "lfm2", (2048, 8192, 16)),
        layer_types=["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
        conv_L_cache=3,
        conv_dim=2048,
        block_auto_adjust_ff_dim=True,
        block_dim=2048,
        block_multiple_of=256,
        block_ffn_dim_multiplier=1.0,
        block_ff_dim=12288,
        **_heads(32, 8),
    ),
    "Mamba-Codestral-7B": _of(
        *("Mamba2ForCausalLM", "mamba2", (4096, 8192, 64)),
        num_heads=128,
        head_dim=64,
        state_size=128,
        n_groups=8,
        conv_kernel=4,
        expand=2,
    ),
}
