"""Models whose vLLM code rearranges tensors: refused by name, or their order of heads followed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import rename, write_checkpoint, write_json
from fusedq_kernels.choose.device import cpu_device
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.plan import model_code
from vllm_fusedq.plan.head_order import HeadOrder
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.model_code import head_order, installed_vllm

TARGET = Target(cpu_device(), torch.bfloat16)
OUTPUT = "model.layers.0.self_attn.o_proj"


def checkpoint_of(
    path: Path, architecture: str, module: str, build: str = "gptq-sym", **config: Any
) -> Checkpoint:
    """A checkpoint whose o_proj is called `module` in its block."""
    write_checkpoint(path, build, edits=[rename(OUTPUT, f"model.layers.0.{module}")])
    document = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", document | {"architectures": [architecture]} | config)
    return read_checkpoint(path)


@pytest.mark.parametrize(
    ("architecture", "module", "does"),
    [
        ("BloomForCausalLM", "self_attention.query_key_value", "reorders heads on the first"),
        ("TeleChat2ForCausalLM", "self_attention.key_value", "splits the stored tensors"),
        ("Llama4ForCausalLM", "self_attn.q_proj", "permutes the rows of query and key heads"),
        ("K2HorizonForCausalLM", "self_attn.k_proj", "permutes the rows of query and key heads"),
        ("MuseSparkForConditionalGeneration", "self_attn.q_proj", "permutes the rows"),
        ("MistralForCausalLM", "attention.wq", r"\(Mistral's own names\)"),
        ("MiniCPM3ForCausalLM", "self_attn.q_a_proj", "creates the layer without a name"),
        ("Zamba2ForCausalLM", "mamba.in_proj", "numbers its blocks otherwise than the file"),
        ("GteNewModel", "mlp.up_gate_proj", "splits the stored tensors into up and gate"),
    ],
)
def test_refused_before_anything_loads(
    tmp_path: Path, architecture: str, module: str, does: str
) -> None:
    checkpoint = checkpoint_of(tmp_path, architecture, module)
    with pytest.raises(PreflightError, match=f"{module}.*{does}.*docs/models.md") as error:
        plan_model(checkpoint, TARGET)
    assert "serve this model without --quantization fusedq" in str(error.value)
    if not module.endswith("wq"):
        assert f"vLLM's code for {architecture} rearranges while loading" in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "module", "newest"),
    [
        ("GPTNeoXForCausalLM", "attention.query_key_value", (0, 31)),
        ("HunYuanDenseV1ForCausalLM", "self_attn.qkv_proj", (0, 28)),
        ("Plamo2ForCausalLM", "mixer.in_proj", (0, 26)),
    ],
)
def test_refused_where_the_installed_vllm_has_that_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    module: str,
    newest: tuple[int, int],
) -> None:
    checkpoint = checkpoint_of(tmp_path, architecture, module)
    monkeypatch.setattr(model_code, "installed_vllm", lambda: newest)
    with pytest.raises(PreflightError, match=f"{module}.*{architecture} rearranges"):
        plan_model(checkpoint, TARGET)
    for newer in ((0, newest[1] + 1), None):
        monkeypatch.setattr(model_code, "installed_vllm", lambda newer=newer: newer)
        assert plan_model(checkpoint, TARGET).layers


def test_code_that_asks_for_a_dtype_leaves_the_others_alone(tmp_path: Path) -> None:
    where = ("MiMoV2FlashForCausalLM", "self_attn.qkv_proj")
    assert plan_model(checkpoint_of(tmp_path / "words", *where), TARGET).layers
    floats = checkpoint_of(tmp_path / "floats", *where, "ct-float-channel")
    with pytest.raises(PreflightError, match=r"self_attn.qkv_proj: .* it cuts 8-bit floats"):
        plan_model(floats, TARGET)


def test_other_models_keep_modules_of_these_names(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "GPTBigCodeForCausalLM", "query_key_value")
    assert plan_model(checkpoint, TARGET).layers


def test_the_version_beside_this_package_is_found() -> None:
    vllm = pytest.importorskip("vllm")
    major, minor = vllm.__version__.split(".")[:2]
    assert installed_vllm() == (int(major), int(minor))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, HeadOrder(2, 2, 8)),
        ({"new_decoder_architecture": True, "n_head_kv": 2}, HeadOrder(2, 2, 8)),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, None),
        ({"new_decoder_architecture": True, "num_kv_heads": "2"}, None),
        ({"new_decoder_architecture": True, "num_kv_heads": -2}, None),
        ({"multi_query": False}, None),
    ],
)
def test_head_order_by_the_models_config(
    tmp_path: Path, config: dict[str, Any], expected: HeadOrder | None
) -> None:
    """64 rows: 2 groups of 2 query heads and a pair of 8; no 12 heads have 64."""
    checkpoint = checkpoint_of(tmp_path, "FalconForCausalLM", "query_key_value", **config)
    assert head_order(checkpoint, "model.layers.0.query_key_value", 64) == expected
    assert head_order(checkpoint, "model.layers.0.mlp.up_proj", 64) is None


def test_falcon_without_keys_is_multi_query(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "RWForCausalLM", "query_key_value")
    assert head_order(checkpoint, "h.0.query_key_value", 96) == HeadOrder(1, 4, 16)
    assert head_order(checkpoint, "h.0.query_key_value", 100) is None
