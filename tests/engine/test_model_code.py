"""Models whose rows, names or loading code are not Llama's, against transformers in fp32."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    NemotronHConfig,
    PreTrainedConfig,
)

from engines import EngineFailed, ask, generate, mean_error
from random_models import VOCABULARY, falcon_h1_config, write_random_model
from test_tensor_parallel import TWO_RANKS

pytestmark = pytest.mark.engine

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 2}
PROMPTS = 6
CANDIDATES = [[(7 * i + 11 * j + 3) % VOCABULARY for i in range(24)] for j in range(48)]


def falcon(**config: Any) -> FalconConfig:
    untied = {"alibi": False, "bias": False, "tie_word_embeddings": False}
    return FalconConfig(**SIZES, num_attention_heads=4, **{**untied, **config})


def gpt(kind: type[PreTrainedConfig], **config: Any) -> PreTrainedConfig:
    return kind(vocab_size=VOCABULARY, n_embd=256, n_head=4, n_layer=2, n_positions=256, **config)


NEW_FALCON = falcon(new_decoder_architecture=True, num_kv_heads=2)
OLD_FALCON = falcon(multi_query=False, parallel_attn=False, bias=True, alibi=True)
MAMBA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
# One group of B and C, which both ranks hold whole
GRANITE_4 = GraniteMoeHybridConfig(
    **SIZES | MAMBA,
    num_local_experts=0,
    shared_intermediate_size=512,
    position_embedding_type="nope",
    layer_types=["mamba", "attention"],
    mamba_n_heads=16,
    mamba_d_head=32,
    mamba_n_groups=1,
    mamba_d_state=32,
    mamba_chunk_size=64,
    tie_word_embeddings=False,
)
# Two groups, one for each rank
NEMOTRON_H = NemotronHConfig(
    **SIZES | MAMBA | {"num_hidden_layers": 3},
    hybrid_override_pattern="M-*",
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=32,
    n_groups=2,
    ssm_state_size=32,
    chunk_size=64,
)
# Name -> (config, how it is quantized, ranks). In every run of the tests:
MODELS = {
    "falcon": (NEW_FALCON, "gptq-sym", 1),
    "falcon, two ranks": (NEW_FALCON, "awq", 2),
    "old falcon": (OLD_FALCON, "gptq-asym", 1),
    "falcon-h1, two ranks": (falcon_h1_config(layers=2), "ct-asym", 2),
    "gpt-neox": (GPTNeoXConfig(**SIZES, num_attention_heads=4, intermediate_size=512), "awq", 1),
}
# Only with --all-models:
MORE_MODELS = {
    "falcon, compressed-tensors": (NEW_FALCON, "ct-asym", 2),
    "falcon, act-order": (NEW_FALCON, "gptq-asym-order", 2),
    "falcon, bitsandbytes": (NEW_FALCON, "bnb-nf4", 2),
    "old falcon, two ranks": (OLD_FALCON, "ct-sym", 2),
    "multi-query falcon": (falcon(multi_query=True), "gptq-sym", 1),
    "multi-query falcon, two ranks": (falcon(multi_query=True), "awq", 2),
    "falcon-h1": (falcon_h1_config(layers=2), "gptq-sym", 1),
    "granite 4, two ranks": (GRANITE_4, "bnb-nf4", 2),
    "nemotron-h, two ranks": (NEMOTRON_H, "gptq-asym-order", 2),
    "gpt-bigcode": (gpt(GPTBigCodeConfig, multi_query=True), "gptq-asym", 1),
    "gpt-bigcode, awq": (gpt(GPTBigCodeConfig, multi_query=True), "awq", 1),
    "gpt2": (gpt(GPT2Config), "gptq-sym", 1),
    "gpt2, awq": (gpt(GPT2Config), "awq", 1),
}


@pytest.mark.parametrize("name", [*MODELS, *MORE_MODELS])
def test_answers_as_transformers(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    if name in MORE_MODELS and not request.config.getoption("--all-models"):
        pytest.skip("needs --all-models")
    config, build, tp_size = (MODELS | MORE_MODELS)[name]
    model = write_random_model(tmp_path / "model", config, build)
    prompts, expected_tokens = model.sure_prompts(CANDIDATES, PROMPTS)
    answers = generate(
        tmp_path,
        model.path,
        prompts,
        env=TWO_RANKS if tp_size == 2 else None,
        quantization="fusedq",
        tensor_parallel_size=tp_size,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="bfloat16",
    )
    errors = [
        mean_error(answer["prompt_logprobs"], expected)
        for answer, expected in zip(answers, model.logprobs(prompts), strict=True)
    ]
    assert sum(errors) / len(errors) <= 0.02
    assert [answer["tokens"] for answer in answers] == [[token] for token in expected_tokens]
    layers = {re.sub(r"\b[kv]_proj$", "q_proj", module) for module in model.truths}
    layers -= {re.sub(r"\bgate_proj$", "up_proj", module) for module in layers if "gate" in module}
    assert f"fused: {len(layers)} (" in (tmp_path / "engine.log").read_text()


def test_model_code_that_rearranges_unknown_to_us_is_refused(tmp_path: Path) -> None:
    """A model class from outside of vLLM that reorders rows of what it loads."""
    model = write_random_model(tmp_path / "model", NEW_FALCON, "gptq-sym")
    with pytest.raises(EngineFailed) as error:
        ask("rearranging.py", tmp_path, {"engine": {"model": str(model.path)}}, None)
    said = str(error.value)
    assert "WeightLoadError: transformer.h.0.self_attention.dense.qweight: found a tensor" in said
    assert "is a model class from outside of vLLM" in said
