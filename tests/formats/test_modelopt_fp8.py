"""ModelOpt's configs over 8-bit floats: where they are, what they exclude, mix and refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import (
    ALL_BUILDS,
    FLOAT_BUILDS,
    add,
    make_plain,
    rename,
    write_checkpoint,
    write_json,
)
from kv_scales import kv_scales
from layers import problems_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint
from vllm_fusedq.formats import CheckpointFormat, format_for
from vllm_fusedq.plan.kv_cache import served_kv_dtype

BUILD = "modelopt-fp8"
GATE, UP, DOWN = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))
ATTENTION = "model.layers.0.self_attn"


def load(path: Path, build: str = BUILD, **options: Any) -> CheckpointFormat:
    write_checkpoint(path, build, **options)
    return format_for(read_checkpoint(path))


@pytest.mark.parametrize(
    ("build", "description"),
    [
        (BUILD, "modelopt fp8 8-bit per channel, activations in 16 bits, not 8-bit float"),
        (
            "modelopt-fp8-channel",
            "modelopt fp8 8-bit per channel, activations in 16 bits, not 8-bit float, per token",
        ),
        ("modelopt-fp8-block", "modelopt fp8 128x128 8-bit g128"),
    ],
)
def test_every_algorithm_is_described(build: str, description: str, tmp_path: Path) -> None:
    fmt = load(tmp_path, build)
    assert {fmt.layer_of(module).description for module in fmt.modules()} == {description}
    assert fmt.layer_of("lm_head") is None


def test_the_older_file_beside_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, BUILD, edits=[make_plain(UP, 96, 64)])
    document = json.loads((tmp_path / "config.json").read_text())
    del document["quantization_config"]
    write_json(tmp_path / "config.json", document)
    section = {"quant_algo": "fp8", "kv_cache_quant_algo": None, "exclude_modules": ["*.up_proj"]}
    older = {"producer": {"name": "modelopt"}, "quantization": section}
    write_json(tmp_path / "hf_quant_config.json", older)
    fmt = format_for(read_checkpoint(tmp_path))
    assert fmt.layer_of(UP) is None
    assert fmt.layer_of(DOWN).description.startswith("modelopt fp8 8-bit")


@pytest.mark.parametrize("pattern", [UP, "*up_proj", "model.layers.0.mlp.u*", "up_proj"])
def test_excluded_by_name_wildcard_and_part(pattern: str, tmp_path: Path) -> None:
    fmt = load(tmp_path, config={"ignore": [pattern]}, edits=[make_plain(UP, 96, 64)])
    assert fmt.layer_of(UP) is None
    assert UP not in fmt.modules()
    assert problems_of(fmt, DOWN) == []


def test_what_the_config_does_not_exclude_has_to_be_there(tmp_path: Path) -> None:
    fmt = load(tmp_path / "plain", edits=[make_plain(UP, 96, 64)])
    (problem,) = problems_of(fmt, UP)
    assert "an unquantized weight F16 [96, 64] although the config says" in str(problem)
    fmt = load(tmp_path / "packed", config={"ignore": ["*up_proj"]})
    (problem,) = problems_of(fmt, UP)
    assert "packed tensors (input_scale, weight_scale) although the config leaves" in str(problem)


def test_a_vision_tower_stays_as_it_is(tmp_path: Path) -> None:
    edits = [make_plain(UP, 96, 64), rename(UP, "vision_tower.layers.0.mlp.up_proj")]
    assert load(tmp_path, edits=edits).layer_of("vision_tower.layers.0.mlp.up_proj") is None


def test_an_lm_head_is_quantized_unless_it_is_excluded(tmp_path: Path) -> None:
    made = FLOAT_BUILDS[BUILD]
    tensors = made.tensors(made.truth(32, 64, -1))
    edits = [add(f"lm_head.{name}", tensor) for name, tensor in tensors.items()]
    fmt = load(tmp_path / "packed", edits=edits, config={"ignore": []})
    assert fmt.layer_of("lm_head").description.startswith("modelopt fp8")
    fmt = load(tmp_path / "excluded", edits=edits)
    (problem,) = problems_of(fmt, "lm_head")
    assert "although the config leaves this module unquantized" in str(problem)


def test_layers_of_a_mixed_model_name_their_algorithms(tmp_path: Path) -> None:
    edits = []
    for module, build, n, k in (
        (DOWN, "modelopt-fp8-block", 64, 96),
        (UP, "modelopt-nvfp4", 96, 64),
        (GATE, "modelopt-nvfp4", 96, 64),
    ):
        made = ALL_BUILDS[build]
        edits.append(make_plain(module, n, k))
        for name, tensor in made.tensors(made.truth(n, k, -1)).items():
            edits.append(add(f"{module}.{name}", tensor))
    listed = {f"{ATTENTION}.{part}_proj": {"quant_algo": "FP8"} for part in "qkvo"}
    listed |= {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in (UP, GATE)}
    listed[DOWN] = {"quant_algo": "fp8_pb_wo", "group_size": 128}
    config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    fmt = load(tmp_path / "mixed", edits=edits, config=config)
    assert fmt.layer_of(DOWN).description == "modelopt fp8 128x128 8-bit g128"
    assert fmt.layer_of(UP).description.startswith("modelopt nvfp4 4-bit g16")
    assert fmt.layer_of(f"{ATTENTION}.q_proj").activations == "8-bit float"
    assert not [problem for module in fmt.modules() for problem in problems_of(fmt, module)]
    listed[DOWN] = {"quant_algo": "NVFP4_AWQ"}
    fmt = load(tmp_path / "other", edits=edits, config=config)
    (problem,) = problems_of(fmt, DOWN)
    assert "found quant_algo NVFP4_AWQ; supported: NVFP4, " in str(problem)


def test_a_quantized_kv_cache(tmp_path: Path) -> None:
    """By either spelling, and the names of scales that the tool writes."""
    edits = [kv_scales((0.03, 0.04), spelling="modelopt")]
    for name, config in (
        ("algorithm", {"kv_cache_quant_algo": "FP8"}),
        ("scheme", {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}),
    ):
        fmt = load(tmp_path / name, edits=edits, config=config)
        assert served_kv_dtype(fmt, "auto") == "fp8"
        assert not [problem for module in fmt.modules() for problem in problems_of(fmt, module)]


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (BUILD, {"ignore": "lm_head"}, "ignore 'lm_head'; .*a list of names"),
        ("modelopt-fp8-block", {"group_size": 64}, "group_size 64; .*group_size 128 of FP8_PB_WO"),
        (BUILD, {"quantized_layers": ["a"]}, r"FP8 with quantized_layers \['a'\]; .*each layer"),
        (BUILD, {"quant_algo": "W4A16_AWQ"}, "quant_algo 'W4A16_AWQ'; .*FP8, .*MIXED_PRECISION"),
    ],
)
def test_refuses_config(build: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        load(tmp_path, build, config=config)


def test_groups_that_say_so_keep_their_activations(tmp_path: Path) -> None:
    groups = {"group_0": {"weights": {"num_bits": 8}, "input_activations": None}}
    fmt = load(tmp_path, config={"config_groups": groups}, dtype=torch.bfloat16)
    assert fmt.layer_of(UP).activations == ""
