"""Decoders of linear layers and attention."""

from architectures.base import BOTH, GPT, HEADS, LATENT, SLIDING, TIED, VOCABULARY, bare, dense

ONE_EXPERT = {"first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1}
GEMMA = TIED | {"query_pre_attn_scalar": 64}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 64}
FALCON = HEADS | {"alibi": False, "bias": False}
NEW_FALCON = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
OLD_FALCON = FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
OPT = {"ffn_dim": 512, "word_embed_proj_dim": 256, "max_position_embeddings": 256}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 256, "n_layer": 2, "n_head": 4}

DENSE = {
    "Apertus": dense("apertus", "awq"),
    "Arcee": dense("arcee", "gptq-sym"),
    "Bloom": bare("bloom", "gptq-sym", BLOOM, refused="BloomForCausalLM rearranges"),
    "Cohere": dense("cohere", "ct-asym", TIED, {"use_qk_norm": True, "logit_scale": 1.0}),
    "Cohere 2": dense("cohere2", "gptq-asym", TIED, {"logit_scale": 1.0}),
    "CWM": dense("cwm", "ct-sym"),
    "DeepSeek-V2": dense("deepseek_v2", "awq", LATENT, ONE_EXPERT, apart=True),
    "DeepSeek-V2, two ranks": dense(
        "deepseek_v2", "awq", LATENT, ONE_EXPERT, ranks=(2,), apart=True
    ),
    "DeepSeek-V3": dense(
        "deepseek_v3", "gptq-sym", LATENT, ONE_EXPERT, {"n_group": 1, "topk_group": 1}, apart=True
    ),
    "ERNIE 4.5": dense("ernie4_5", "bnb-nf4"),
    "EXAONE 4": dense("exaone4", "ct-sym", SLIDING),
    "Falcon": bare("falcon", "gptq-sym", NEW_FALCON),
    "Falcon, AWQ": bare("falcon", "awq", NEW_FALCON, ranks=(2,)),
    "Falcon, compressed-tensors": bare("falcon", "ct-asym", NEW_FALCON, ranks=(2,)),
    "Falcon, act-order": bare("falcon", "gptq-asym-order", NEW_FALCON, ranks=(2,)),
    "Falcon, bitsandbytes": bare("falcon", "bnb-nf4", NEW_FALCON, ranks=(2,)),
    "Falcon, old blocks": bare("falcon", "gptq-asym", OLD_FALCON, ranks=BOTH),
    "Falcon, multi-query": bare("falcon", "awq", FALCON, {"multi_query": True}, ranks=BOTH),
    "Gemma": dense("gemma", "gptq-asym", TIED),
    "Gemma 2": dense("gemma2", "awq", GEMMA, ranks=BOTH),
    "Gemma 3": dense("gemma3_text", "ct-asym", GEMMA, SLIDING),
    "Gemma 3n": dense(
        "gemma3n_text",
        "gptq-sym",
        *(TIED, SLIDING, PER_LAYER),
        {"laurel_rank": 64, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
        plain=("altup",),
        apart=True,
    ),
    "Gemma 4": dense("gemma4_text", "gptq-sym", TIED, SLIDING, PER_LAYER, dtype="float16"),
    "GLM": dense("glm", "bnb-nf4"),
    "GLM-4": dense("glm4", "gptq-sym", ranks=BOTH),
    "GPT-2": bare("gpt2", "gptq-sym", GPT),
    "GPT-2, AWQ": bare("gpt2", "awq", GPT),
    "GPT-BigCode": bare("gpt_bigcode", "gptq-asym", GPT, {"multi_query": True}),
    "GPT-BigCode, AWQ": bare("gpt_bigcode", "awq", GPT, {"multi_query": True}),
    "GPT-J": bare("gptj", "awq", GPT, {"rotary_dim": 32}),
    "GPT-NeoX": bare("gpt_neox", "awq", HEADS, {"intermediate_size": 512}),
    "Granite": dense("granite", "awq", {"attention_multiplier": 1 / 64}),
    "Granite SWA": dense("granite_swa", "gptq-asym", {"attention_multiplier": 1 / 64}),
    "HunYuan": dense("hunyuan_v1_dense", "ct-sym"),
    "HyperCLOVA X": dense("hyperclovax", "gptq-sym"),
    "Jais 2": dense("jais2", "awq"),
    "Llama": dense("llama", "awq", ranks=BOTH),
    "MiniCPM 3": dense("minicpm3", "gptq-sym", LATENT, refused="MiniCPM3ForCausalLM rearranges"),
    "Ministral 3": dense("ministral3", "ct-asym"),
    "Mistral": dense("mistral", "gptq-asym-order", ranks=BOTH),
    "Nemotron": dense("nemotron", "gptq-sym", dtype="float16"),
    "OLMo": dense("olmo", "awq"),
    "OLMo 2": dense("olmo2", "gptq-asym"),
    "OLMo 3": dense("olmo3", "ct-asym", SLIDING),
    "OPT": bare("opt", "gptq-sym", HEADS, OPT, TIED),
    "Phi": dense("phi", "gptq-sym"),
    "Phi-3": dense("phi3", "awq", ranks=BOTH),
    "Qwen2": dense("qwen2", "gptq-sym", ranks=BOTH),
    "Qwen3": dense("qwen3", "awq", ranks=BOTH),
    "Seed-OSS": dense("seed_oss", "gptq-asym"),
    "SmolLM3": dense("smollm3", "ct-sym"),
    "StableLM": dense("stablelm", "gptq-sym"),
    "StarCoder2": dense("starcoder2", "awq"),
    "VaultGemma": dense("vaultgemma", "gptq-sym", GEMMA),
}
