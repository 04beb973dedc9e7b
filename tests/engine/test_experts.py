"""Mixtures of experts in vLLM's engine, on one rank and on two, against plain ones in fp32."""

from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV2Config, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from architectures.base import VOCABULARY
from checkpoints import Tensors, drop, put
from engines import SMALL, EngineFailed, ask, generate, mean_error
from local_server import compile_arguments
from mixtures import stacked
from random_models import write_dequantized, write_random_model
from test_tensor_parallel import TWO_RANKS
from tiny_models import MIXTURE, asset, reference

pytestmark = pytest.mark.engine

CANDIDATES = [[(7 * i + 11 * j + 3) % VOCABULARY for i in range(24)] for j in range(60)]
PROMPTS = CANDIDATES[:6]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# At two ranks a rank's 48 features of an expert end inside a group of 32.
QWEN3 = Qwen3MoeConfig(
    **SIZES,
    head_dim=32,
    moe_intermediate_size=96,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
)
MIXTRAL = MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=5)
# vLLM's attention on a CPU takes this latent only
DEEPSEEK = DeepseekV2Config(
    **SIZES,
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 16, "qk_rope_head_dim": 64, "v_head_dim": 16},
    **{"q_lora_rank": None, "intermediate_size": 96, "moe_intermediate_size": 96},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
)
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
EP2 = TP2 | {"enable_expert_parallel": True}
KEPT = {"additional_config": {"fusedq": {"activations": "16-bit"}}}
COMPILED = {"enforce_eager": compile_arguments() != []}
# Name -> (config, how it is quantized, what is not, engine). In every run of the tests:
MODELS: dict[str, tuple[PreTrainedConfig, str, str, dict[str, Any]]] = {
    "mixtral, experts on two ranks, compiled": (MIXTRAL, "gptq-asym", "", EP2 | COMPILED),
    "deepseek, stacked": (DEEPSEEK, "ct-sym", "self_attn", {}),
}
# Only with --all-models:
MORE_MODELS: dict[str, tuple[PreTrainedConfig, str, str, dict[str, Any]]] = {
    "qwen3": (QWEN3, "ct-asym", "", {}),
    "qwen3, two ranks": (QWEN3, "awq", "", TP2),
    "qwen3, act-order, two ranks": (QWEN3, "gptq-sym-order", "", TP2),
    "qwen3, act-order, experts on two ranks": (QWEN3, "gptq-asym-order", "", EP2),
    "qwen3, 8 bits, experts on two ranks": (QWEN3, "gptq-8bit-asym", "", EP2),
    "qwen3, two ranks, compiled": (QWEN3, "gptq-sym", "", TP2 | COMPILED),
    "mixtral, bitsandbytes, two ranks": (MIXTRAL, "bnb-nf4-nested", "", TP2),
    "qwen3, stacked, two ranks": (QWEN3, "ct-asym", "", TP2),
    "qwen3, stacked, 8-bit floats, experts on two ranks": (QWEN3, "fp8-block", "", EP2 | KEPT),
    "mixtral, experts on two ranks": (MIXTRAL, "ct-sym", "", EP2),
    "deepseek, compiled": (DEEPSEEK, "ct-sym", "self_attn", COMPILED),
    "deepseek, two ranks": (DEEPSEEK, "awq", "self_attn", TP2),
    "deepseek, experts on two ranks": (DEEPSEEK, "ct-asym", "self_attn", EP2),
}


def serve(
    folder: Path, model: Path, prompts: list[list[int]], **engine: Any
) -> list[dict[str, Any]]:
    return generate(
        folder,
        model,
        prompts,
        env=TWO_RANKS if "tensor_parallel_size" in engine else None,
        skip_tokenizer_init=True,
        max_model_len=128,
        **({"quantization": "fusedq", "dtype": "float16", "enforce_eager": True} | engine),
    )


@pytest.mark.parametrize("name", [*MODELS, *MORE_MODELS])
def test_answers_as_plain_models(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    if name in MORE_MODELS and not request.config.getoption("--all-models"):
        pytest.skip("needs --all-models")
    config, build, plain, engine = (MODELS | MORE_MODELS)[name]
    edits = [stacked()] if "stacked" in name else []
    left = (plain,) if plain else ()
    model = write_random_model(tmp_path / "model", config, build, left, edits=edits)
    prompts, tokens = model.sure_prompts(CANDIDATES, len(PROMPTS))
    expected = model.logprobs(prompts)
    if config is DEEPSEEK:
        # vLLM's own model of it answers otherwise eagerly on one rank, plain or not
        single = write_random_model(tmp_path / "single", config, build, left)
        plain_path = write_dequantized(tmp_path / "plain", single)
        plainly = engine | {"quantization": None, "dtype": "float32"}
        # vLLM's own experts on a CPU die where some are on another rank
        plainly.pop("enable_expert_parallel", None)
        answers = serve(tmp_path, plain_path, prompts, **plainly)
        expected = [answer["prompt_logprobs"] for answer in answers]
        tokens = [answer["tokens"][0] for answer in answers]
    answers = serve(tmp_path, model.path, prompts, **engine)
    errors = [
        mean_error(answer["prompt_logprobs"], wanted)
        for answer, wanted in zip(answers, expected, strict=True)
    ]
    assert sum(errors) / len(errors) <= 0.02
    assert [answer["tokens"][0] for answer in answers] == tokens
    log = (tmp_path / "engine.log").read_text()
    count = 5 if config is MIXTRAL else 4
    held = -(-count // 2) if "enable_expert_parallel" in engine else count
    assert "experts.w13" in log
    assert f" ({held} experts)" in log
    assert "fallbacks: 0" in log


ENGINES = {"two ranks": TP2, "one rank": {}, "experts on two ranks, compiled": EP2 | COMPILED}


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_by_llm_compressor_answers_as_its_own_dequantization(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """Groups of 64, of which a rank of two cuts those of w2."""
    if name != "two ranks" and not request.config.getoption("--all-models"):
        pytest.skip("needs --all-models")
    expected = reference(MIXTURE)
    answers = serve(tmp_path, asset(MIXTURE), expected["prompts"], **ENGINES[name])
    errors = [
        mean_error(answer["prompt_logprobs"], [None, *wanted])
        for answer, wanted in zip(answers, expected["prompt_logprobs"], strict=True)
    ]
    assert sum(errors) / len(errors) <= 0.02


def renumbered(tensors: Tensors) -> None:
    """The same model with its experts in the opposite order."""
    last = QWEN3.num_experts - 1
    for name in list(tensors):
        if name.endswith("mlp.gate.weight"):
            tensors[name] = tensors[name].flip(0).contiguous()
    experts = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for name, tensor in experts.items():
        before, _, after = name.partition(".experts.")
        number, _, rest = after.partition(".")
        tensors[f"{before}.experts.{last - int(number)}.{rest}"] = tensor


def test_reloading_fills_the_same_stacks_with_other_experts(tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.experts.2.up_proj.scales"
    edits = {"first": [], "second": [renumbered], "lacking": [drop(lost)]}
    first, second, lacking = (
        write_random_model(tmp_path / name, QWEN3, "gptq-sym", edits=each).path
        for name, each in edits.items()
    )
    engine = {"quantization": "fusedq", "skip_tokenizer_init": True, "enforce_eager": True}
    request = {
        "engine": {
            **SMALL,
            "model": str(first),
            "max_model_len": 128,
            "dtype": "float16",
            **engine,
        },
        "prompts": PROMPTS,
        "reloads": [str(each) for each in (second, first, lacking)],
    }
    loaded, reloaded, again, refused = ask("reload.py", tmp_path, request, None)
    # Codes, scales and, of the attention layers, nothing more
    assert len(loaded["pointers"][0]) == 2 * (2 + 2) * 2
    assert reloaded["pointers"] == again["pointers"] == loaded["pointers"]
    assert again["prompt_logprobs"] == loaded["prompt_logprobs"]
    # What a stale stack or router would not give
    for found, wanted in zip(reloaded["prompt_logprobs"], loaded["prompt_logprobs"], strict=True):
        assert mean_error(found, wanted) <= 0.02
    assert f"1 tensors were never loaded ({lost})" in refused["error"]


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    bad = "model.layers.1.mlp.experts.3.up_proj.scales"
    edits = [put(bad, (1, 5), float("nan"))]
    model = write_random_model(tmp_path / "model", QWEN3, "awq", edits=edits)
    with pytest.raises(EngineFailed, match=f"WeightLoadError: {bad}: found 1 NaN or infinite"):
        serve(tmp_path, model.path, PROMPTS[:1])
