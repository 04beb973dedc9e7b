"""vLLM's quantization config as vLLM itself makes it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import make_plain, write_checkpoint, write_json
from tiny_models import asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.integration.config import FusedQConfig


def test_quantizing_while_loading_is_refused() -> None:
    """vLLM would do it to the layers that the checkpoint leaves unquantized, and no plan say so."""
    from vllm.config import LoadConfig, ModelConfig, VllmConfig
    from vllm.config.quantization import resolve_quantization_config

    from vllm_fusedq.integration.register import register_plugin

    register_plugin()
    online = resolve_quantization_config("fusedq", {"linear": "fp8_per_tensor"})
    model = ModelConfig(
        str(asset("tiny-llama-awq-g128")),
        quantization="fusedq",
        quantization_config=online,
        dtype=torch.float16,
    )
    message = "tiny-llama-awq-g128: found --quantization-config, by which vLLM quantizes layers"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        VllmConfig.get_quantization_config(model, LoadConfig())


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the configuration hook logs; vLLM keeps its loggers from pytest."""
    from vllm_fusedq.integration import config

    lines: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *words: lines.append(text % words))
    return lines


def configured(path: Path) -> FusedQConfig:
    config = FusedQConfig()
    config.maybe_update_config(str(path))
    return config


ADAPTER = "base_model.model.model.norm.lora_A.weight"


def test_an_adapter_beside_the_model_is_named_and_dropped(tmp_path: Path, told: list[str]) -> None:
    write_checkpoint(tmp_path, "bnb-nf4")
    assert configured(tmp_path).get_cache_scale_mapper().apply_list([ADAPTER]) == [ADAPTER]
    save_file({ADAPTER: torch.zeros(4, 64)}, tmp_path / "adapter_model.safetensors")
    mapper = configured(tmp_path).get_cache_scale_mapper()
    kept = "model.layers.0.mlp.up_proj.weight.absmax"
    assert mapper.apply_list([ADAPTER, kept]) == [kept.replace("weight.absmax", "weight_absmax")]
    assert told == [f"{tmp_path}: not read, as no part of the model: adapter_model.safetensors"]


def test_tensors_keep_the_names_that_a_models_code_would_change(tmp_path: Path) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    write_checkpoint(tmp_path, "fp8-tensor")
    changes = {".weight_scale_inv": ".weight_scale", ".activation_scale": ".input_scale"}
    mapper = WeightsMapper(orig_to_new_suffix=changes | {".gamma": ".weight"})
    mapper |= configured(tmp_path).get_cache_scale_mapper()
    names = [f"model.layers.0.mlp.up_proj{name}" for name in changes]
    assert mapper.apply_list([*names, "model.norm.gamma"]) == [*names, "model.norm.weight"]


def test_a_list_with_another_prefix_is_named(tmp_path: Path, told: list[str]) -> None:
    module = "model.layers.0.mlp.down_proj"
    config = {"ignore": ["lm_head", f"language_model.{module}"]}
    write_checkpoint(tmp_path, "ct-sym", config=config, edits=[make_plain(module, 64, 96)])
    configured(tmp_path)
    (line,) = told
    assert line.startswith(f"{module}: unquantized, as the file proves; ignore in the config lists")


def test_files_that_vllm_would_load_instead_are_refused(tmp_path: Path) -> None:
    from vllm_fusedq.integration.worker import _check_load_format

    write_checkpoint(tmp_path, "awq")
    tensors = load_file(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    write_json(tmp_path / "model.safetensors.index.json", index)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    _check_load_format(checkpoint, "safetensors")
    message = "found consolidated.safetensors beside the model, .*--load-format safetensors"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        _check_load_format(checkpoint, "auto")
