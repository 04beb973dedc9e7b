"""Decoders with layers of state: Mamba, Mamba-2, gated delta networks, short convolutions."""

from architectures.base import BLOCKS, BOTH, DELTA, HEADS, Architecture, bare, dense

MAMBA = BLOCKS | {"time_step_rank": 32}
MAMBA_2 = {"num_heads": 16, "head_dim": 32, "state_size": 32, "n_groups": 1, "chunk_size": 64}
FALCON_H1 = {
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "mamba_d_ssm": 256,
    "mamba_n_heads": 32,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_chunk_size": 64,
}
"""Attention beside a Mamba-2 layer with one group of B and C, in each block."""
# One group of B and C, which both ranks hold whole
GRANITE_4 = {
    "num_local_experts": 0,
    "shared_intermediate_size": 512,
    "position_embedding_type": "nope",
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 16,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_chunk_size": 64,
}
# Two groups, one for each rank
NEMOTRON_H = {
    "num_hidden_layers": 3,
    "hybrid_override_pattern": "M-*",
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 32,
    "chunk_size": 64,
}
JAMBA = {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 32,
}
ZAMBA_2 = {
    "mamba_d_state": 32,
    "n_mamba_heads": 16,
    "chunk_size": 64,
    "attention_hidden_size": 512,
    "attention_head_dim": 128,
    "num_mem_blocks": 1,
    "adapter_rank": 32,
    "layers_block_type": ["mamba", "hybrid"],
    "num_key_value_heads": 4,
}
NO_SCAN = "'_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'"
NO_TRITON = "module 'triton' has no attribute 'set_allocator'"
LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    # vLLM's code reads these, which checkpoints have and transformers leaves out
    "conv_dim": 256,
    "block_dim": 256,
}

HYBRID: dict[str, Architecture] = {
    "Falcon-H1": bare("falcon_h1", "gptq-sym", HEADS, FALCON_H1),
    "Falcon-H1, compressed-tensors": bare("falcon_h1", "ct-asym", HEADS, FALCON_H1, ranks=(2,)),
    "Falcon Mamba": bare("falcon_mamba", "gptq-sym", MAMBA, fails=NO_SCAN),
    "Granite 4": dense("granitemoehybrid", "bnb-nf4", GRANITE_4, ranks=BOTH),
    "Jamba": dense("jamba", "awq", JAMBA, fails=NO_SCAN),
    "LFM2": dense("lfm2", "gptq-sym", LFM2, apart=True),
    "Mamba": bare("mamba", "awq", MAMBA, fails=NO_SCAN),
    "Mamba 2": bare("mamba2", "gptq-sym", BLOCKS, MAMBA_2),
    "Nemotron-H": dense("nemotron_h", "gptq-asym-order", NEMOTRON_H, ranks=BOTH),
    "OLMo Hybrid": dense("olmo_hybrid", "awq", DELTA, plain=("a_proj", "b_proj"), fails=NO_TRITON),
    "Qwen3.5": dense(
        "qwen3_5_text",
        "awq",
        DELTA,
        ranks=BOTH,
        plain=("in_proj_a", "in_proj_b"),
        in_fp32=False,
    ),
    "Zamba 2": dense("zamba2", "gptq-sym", ZAMBA_2, refused="Zamba2ForCausalLM rearranges"),
}
