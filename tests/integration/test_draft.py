"""Draft models: planned by their own tensors, and which are refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtp import BLOCK, write_mimo
from tiny_models import UNQUANTIZED, asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.formats import format_for
from vllm_fusedq.integration.draft import check_draft, model_config_of

TARGET = "tiny-llama-gptq-g128"


@pytest.mark.parametrize("quantized", [True, False])
def test_an_extra_block_is_planned_by_its_own_tensors(tmp_path: Path, quantized: bool) -> None:
    from vllm_fusedq.integration.config import FusedQConfig

    write_mimo(tmp_path, quantized=quantized)
    config = FusedQConfig()
    config.format = format_for(read_checkpoint(tmp_path))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    found = config.modules_of("model.layers.2.self_attn.qkv_proj")
    assert found == tuple(f"{BLOCK}.self_attn.{p}_proj" for p in "qkv")
    described = [config.format.layer_of(module) for module in found]
    assert [each is not None for each in described] == [quantized] * 3
    assert config.modules_of("model.layers.1.mlp.down_proj") == ("model.layers.1.mlp.down_proj",)


def speculative(draft: Path, target: str = TARGET, **options: object) -> object:
    """vLLM's own configuration of a draft model."""
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig

    from vllm_fusedq.integration.register import register_plugin

    register_plugin()
    model = ModelConfig(str(asset(target)), quantization="fusedq", dtype=torch.float16)
    return SpeculativeConfig(
        model=str(draft),
        num_speculative_tokens=2,
        target_model_config=model,
        target_parallel_config=ParallelConfig(),
        **options,
    )


@pytest.mark.parametrize("draft", [TARGET, "tiny-llama-ct-sym-g128"])
def test_refuses_a_draft_that_vllm_would_run_by_itself(draft: str) -> None:
    """Also where it is the target's own checkpoint."""
    message = (
        f"{draft}: found a draft model with quantization .*; supported: draft models that are "
        'unquantized or run fused themselves; add "quantization": "fusedq" to --speculative-config'
    )
    with pytest.raises(UnsupportedCheckpoint, match=message):
        check_draft(speculative(asset(draft), method="draft_model"))


def test_refuses_a_quantized_draft_of_another_kind() -> None:
    config = speculative(asset("tiny-llama-awq-g128"), method="draft_model", quantization="fusedq")
    check_draft(config)
    config.method = "eagle"
    message = "found a quantized draft model of the method eagle; supported: .* draft_model and mtp"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        check_draft(config)


def test_an_unquantized_draft_and_none_at_all_pass() -> None:
    check_draft(None)
    check_draft(speculative(asset(UNQUANTIZED), method="draft_model"))


def test_looking_up_the_prompt_is_no_draft_model() -> None:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig

    model = ModelConfig(str(asset(TARGET)), quantization="fusedq", dtype=torch.float16)
    check_draft(
        SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=2,
            prompt_lookup_max=2,
            target_model_config=model,
            target_parallel_config=ParallelConfig(),
        )
    )


def test_a_draft_has_a_revision_of_its_own() -> None:
    """It may be built under the configuration of the model that is served."""
    target, draft = (SimpleNamespace(revision=each, runner_type="generate") for each in "td")
    served = object()
    config = SimpleNamespace(model_config=target, quant_config=served, speculative_config=None)
    assert model_config_of(config, served).revision == "t"
    config.speculative_config = SimpleNamespace(draft_model_config=draft)
    assert model_config_of(config, served).revision == "t"
    assert model_config_of(config, object()).revision == "d"
