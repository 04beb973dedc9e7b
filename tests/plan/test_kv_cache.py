"""KV-cache schemes and scales: which are served, what is said of them, which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from checkpoints import BUILDS, Edit, add, drop, write_checkpoint, write_json
from fusedq_kernels.choose.device import cpu_device
from kv_scales import SCHEME, SPELLINGS, kv_scales
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.cli import app
from vllm_fusedq.errors import PreflightError, UnsupportedCheckpoint
from vllm_fusedq.formats import format_for
from vllm_fusedq.load.convert import convert
from vllm_fusedq.plan.kv_cache import kv_cache_summary, scaled_attention, served_kv_dtype
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import ModelPlan, plan_model

ATTENTION = "model.layers.0.self_attn"
BOTH = ((0.03, 0.04), (0.05, 0.06))
TARGET = Target(cpu_device(), torch.bfloat16)


def write(path: Path, build: str, *edits: Edit, **config: Any) -> Checkpoint:
    write_checkpoint(path, build, layers=2, edits=edits, config=config)
    return read_checkpoint(path)


def plan(checkpoint: Checkpoint) -> ModelPlan:
    return plan_model(checkpoint, TARGET)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("build", BUILDS)
def test_scales_beside_every_format_change_no_layer(
    build: str, spelling: str, tmp_path: Path
) -> None:
    plain = plan(write(tmp_path / "plain", build))
    checkpoint = write(tmp_path / "scaled", build, kv_scales(*BOTH, spelling=spelling))
    assert plan(checkpoint) == plain
    fmt = format_for(checkpoint)
    parts = {"kv_scale"} if spelling == "shared" else {"k_scale", "v_scale"}
    assert {name: set(each) for name, each in fmt.kv_tensors.items()} == {
        f"model.layers.{block}.self_attn": parts for block in range(2)
    }
    assert kv_cache_summary(fmt) == (
        "k and v scales of 2 attention layers, one per tensor: --kv-cache-dtype fp8 applies them, "
        "auto does not"
    )
    assert served_kv_dtype(fmt, "auto") == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", ["ct-sym", "gptq-sym"])
def test_a_scheme_makes_the_cache_fp8(build: str, dtype: torch.dtype, tmp_path: Path) -> None:
    edits = [kv_scales(*BOTH, dtype=dtype)]
    edits += [add(f"{ATTENTION}.{p}_zero_point", torch.zeros(1, dtype=torch.int8)) for p in "kv"]
    checkpoint = write(tmp_path, build, *edits, kv_cache_scheme=SCHEME)
    plan(checkpoint)
    fmt = format_for(checkpoint)
    assert kv_cache_summary(fmt) == (
        "fp8 KV cache (--kv-cache-dtype auto, by kv_cache_scheme): k and v scales of 2 attention "
        "layers, one per tensor"
    )
    asked = ("auto", "bfloat16", "fp8", "fp8_e4m3")
    assert [served_kv_dtype(fmt, each) for each in asked] == ["fp8", *asked[1:]]


def test_nothing_is_said_where_nothing_is_stored(tmp_path: Path) -> None:
    fmt = format_for(write(tmp_path, "ct-sym"))
    assert kv_cache_summary(fmt) == ""
    assert served_kv_dtype(fmt, "auto") == "auto"
    assert scaled_attention(f"{ATTENTION}.attn", fmt, {}) is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_bits": 4}, "kv_cache_scheme with num_bits 4"),
        ({"num_bits": 8.0}, "kv_cache_scheme with num_bits 8.0"),
        ({"type": "int"}, "kv_cache_scheme with type 'int'"),
        ({"strategy": "attn_head"}, "kv_cache_scheme with strategy 'attn_head'"),
        ({"strategy": "channel"}, "kv_cache_scheme with strategy 'channel'"),
        ({"strategy": "token"}, "kv_cache_scheme with strategy 'token'"),
        ({"symmetric": False}, "kv_cache_scheme with symmetric False"),
        ({"dynamic": True}, "kv_cache_scheme with dynamic True"),
        ({"dynamic": "local"}, "kv_cache_scheme with dynamic 'local'"),
        ({"group_size": 64}, "kv_cache_scheme with group_size 64"),
    ],
)
@pytest.mark.parametrize("build", ["ct-sym", "awq"])
def test_other_schemes_are_refused(
    build: str, change: dict[str, Any], found: str, tmp_path: Path
) -> None:
    scheme = {**SCHEME, **change}
    checkpoint = write(tmp_path, build, kv_scales(*BOTH), kv_cache_scheme=scheme)
    with pytest.raises(UnsupportedCheckpoint) as error:
        plan(checkpoint)
    assert f": found {found}; supported by " in str(error.value)
    assert "8-bit floats, symmetric, one static scale per tensor; set kv_cache" in str(error.value)


def test_a_scheme_that_is_no_object_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "ct-sym", kv_cache_scheme="fp8")
    with pytest.raises(
        UnsupportedCheckpoint, match="found kv_cache_scheme with 'fp8' in place of an object;"
    ):
        plan(checkpoint)


K, V = f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"
SCALE = torch.ones(1)


@pytest.mark.parametrize(
    ("edit", "layer", "found"),
    [
        (add(f"{ATTENTION}.q_scale", SCALE), ATTENTION, "q_scale (quantized queries or attention)"),
        (add(f"{ATTENTION}.q.scale", SCALE), ATTENTION, "q_scale (quantized queries or attention)"),
        (add(f"{ATTENTION}.attn.prob_scale", SCALE), ATTENTION, "prob_scale (quantized queries"),
        (add(f"{ATTENTION}.prob_output_scale", SCALE), ATTENTION, "prob_scale (quantized queries"),
        (add(f"{ATTENTION}.q_zero_point", SCALE), ATTENTION, "q_zero_point (quantized queries"),
        (add(K, torch.ones(4, 1, 1)), ATTENTION, "k_scale of shape [4, 1, 1] (scales per head"),
        (add(f"{ATTENTION}.k_zero_point", torch.zeros(4)), ATTENTION, "k_zero_point of shape [4]"),
        (add(V, SCALE.double()), ATTENTION, "v_scale stored as F64; supported: F32 or BF16 or F16"),
        (drop(K), ATTENTION, "scales named v_scale and no others"),
        (
            add(f"{ATTENTION}.kv_scale", SCALE),
            ATTENTION,
            "scales named k_scale and kv_scale",
        ),
        (
            add(f"{ATTENTION}.k_proj.k_scale", SCALE),
            ATTENTION,
            f"k_scale twice: {ATTENTION}.k_proj.k_scale, {K}",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in (K, V)],
            ATTENTION,
            "no k_scale and v_scale although other layers have them",
        ),
        (
            add("model.layers.1.self_attn.k_proj.k_zero_point", SCALE),
            "model.layers.1.self_attn.k_proj",
            "zero points without scales",
        ),
    ],
)
def test_other_scales_are_refused_by_name(
    edit: Edit, layer: str, found: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path, "ct-sym", kv_scales(*BOTH), edit, kv_cache_scheme=SCHEME)
    with pytest.raises(PreflightError) as error:
        plan(checkpoint)
    assert f"- {layer}: found {found}" in str(error.value)


def test_a_scheme_without_scales_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "ct-sym", kv_cache_scheme=SCHEME)
    with pytest.raises(PreflightError, match="found kv_cache_scheme in the config and no k_scale"):
        plan(checkpoint)


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "awq", kv_scales(*BOTH))
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"kv_lora_rank": 512})
    with pytest.raises(PreflightError, match="scales for multi-head latent attention"):
        plan(read_checkpoint(tmp_path))


def test_blocks_behind_the_decoder_need_no_scales(tmp_path: Path) -> None:
    """Multi-token prediction: vLLM's own scale of 1 is what the checkpoint says of its cache."""
    extra = add("model.layers.2.self_attn.sinks", torch.zeros(4))
    checkpoint = write(tmp_path, "ct-sym", kv_scales(*BOTH), extra, kv_cache_scheme=SCHEME)
    plan(checkpoint)
    assert scaled_attention("model.layers.2.self_attn.attn", format_for(checkpoint), {}) is None


@pytest.mark.parametrize(
    ("prefix", "renamed"),
    [
        ("model.layers.1.self_attn.attn", {}),
        ("language_model.model.layers.1.self_attn.attn", {}),
        (
            "decoder.blocks.1.attention.attn",
            {"decoder.blocks.1.attention": "model.layers.1.self_attn"},
        ),
    ],
)
def test_a_layer_of_vllm_finds_its_scales(
    prefix: str, renamed: dict[str, str], tmp_path: Path
) -> None:
    fmt = format_for(write(tmp_path, "awq", kv_scales(*BOTH, spelling="modelopt")))
    assert scaled_attention(prefix, fmt, renamed) == "model.layers.1.self_attn"


def test_a_layer_of_another_name_in_the_same_block_is_refused(tmp_path: Path) -> None:
    fmt = format_for(write(tmp_path, "awq", kv_scales(*BOTH)))
    message = "layers.1.mixer.attn: found k and v scales named after model.layers.1.self_attn"
    with pytest.raises(PreflightError, match=message):
        scaled_attention("model.layers.1.mixer.attn", fmt, {})


def check(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", *map(str, arguments)], terminal_width=400)
    return done.exit_code, done.output


def test_check_says_the_scheme_and_counts_its_bytes(tmp_path: Path) -> None:
    write(tmp_path, "ct-sym", kv_scales(*BOTH), kv_cache_scheme=SCHEME)
    code, said = check(tmp_path, "--device", "h200")
    assert code == 0
    line = "fp8 KV cache (--kv-cache-dtype auto, by kv_cache_scheme): k and v scales of 2"
    assert said.count(line) == 1
    # 2 blocks, keys and values, hidden 64, a byte each
    assert "(fp8, 256 bytes per token, " in said
    _, wide = check(tmp_path, "--device", "h200", "--kv-cache-dtype", "bfloat16")
    assert "(bfloat16, 512 bytes per token, " in wide
    code, said = check(tmp_path, "--device", "h200", "--json")
    (result,) = json.loads(said)["results"]
    assert code == 0
    assert result["capacity"]["kv_bytes_per_token"] == 256
    assert line in result["notes"][0]["message"]


def test_check_refuses_a_cache_that_the_scales_are_not_for(tmp_path: Path) -> None:
    write(tmp_path, "gptq-sym", kv_scales(*BOTH))
    code, said = check(tmp_path, "--kv-cache-dtype", "fp8_e5m2")
    assert code == 1
    assert "found --kv-cache-dtype fp8_e5m2 beside scales that were made for fp8_e4m3" in said
    assert check(tmp_path, "--kv-cache-dtype", "fp8")[0] == 0


@pytest.mark.parametrize("spelling", ["llm-compressor", "modelopt", "fp8"])
def test_a_conversion_keeps_scales_and_scheme(spelling: str, tmp_path: Path) -> None:
    edit = kv_scales(*BOTH, spelling=spelling)
    source = write(tmp_path / "source", "ct-sym", edit, kv_cache_scheme=SCHEME)
    convert(tmp_path / "source", tmp_path / "out")
    converted = read_checkpoint(tmp_path / "out")
    plan(converted)
    before, after = format_for(source), format_for(converted)
    assert after.name == "fusedq"
    assert after.kv_cache_scheme == SCHEME
    assert kv_cache_summary(after) == kv_cache_summary(before)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    for block in range(2):
        for name in (f"model.layers.{block}.{each}" for each in SPELLINGS[spelling]):
            assert torch.equal(new[name], old[name]), name
