"""AMD Quark: the integers against vLLM's formula, what the config selects and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.quark import FLAVOURS, FLOAT8, layer_config, tensor_config
from checkpoints import (
    ALL_BUILDS,
    QUARK_BUILDS,
    Tensors,
    Truth,
    add,
    drop,
    make_plain,
    put,
    random_truth,
    write_checkpoint,
)
from kv_scales import kv_scales
from layers import MODULE, check, cut, describe, problems_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint, WeightLoadError
from vllm_fusedq.formats import CheckpointFormat, Region, format_for
from vllm_fusedq.plan.kv_cache import kv_cache_problems, served_kv_dtype

UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))
INT4 = {**tensor_config("int4", "per_group"), "group_size": 32, "symmetric": True}
FP8 = tensor_config("fp8_e4m3", "per_tensor")
FLOAT8_NAMES = dict.fromkeys(FLOAT8, "fp8 8-bit per channel")
FLOAT8_NAMES["quark-fp8-block"] = "fp8 24x32 8-bit g32"
W8A8 = ", activations in 16 bits, not fp8_e4m3, static"
SHIFTS = {
    "reorder": torch.tensor([0, 16, 4, 20, 8, 24, 12, 28]),
    "order": torch.arange(0, 32, 4),
}
"""Of the nibbles of a word in the order of their out_features."""


def load(path: Path, build: str = "quark-sym", **options: Any) -> CheckpointFormat:
    write_checkpoint(path, build, **options)
    return format_for(read_checkpoint(path))


def global_config(change: dict[str, Any], **layer: Any) -> dict[str, Any]:
    return {"global_quant_config": {**layer_config({**INT4, **change}), **layer}}


def dequantized(tensors: Tensors, dtype: str, pack_method: str, group_size: int) -> torch.Tensor:
    """`[N, K]` by shifts and signs, as vLLM and Quark say the integers lie."""

    def integers(name: str) -> torch.Tensor:
        nibbles = tensors[name][:, :, None] >> SHIFTS[pack_method] & 15
        return (nibbles - 16 * (nibbles > 7) * (dtype == "int4")).flatten(1).double()

    codes = integers("weight")
    groups = torch.arange(len(codes)) // group_size
    zeros, scales = integers("weight_zero_point"), tensors["weight_scale"].double()
    return ((codes - zeros[groups]) * scales[groups]).T


def truth_of(flavour: str, n: int, k: int, group_size: int, seed: int = 0) -> Truth:
    zero_range = None if FLAVOURS[flavour].symmetric else (0, 15)
    return random_truth(n, k, group_size, zero_range=zero_range, seed=seed)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_builder_means_what_vllm_and_quark_mean(flavour: str) -> None:
    made, truth = FLAVOURS[flavour], truth_of(flavour, 16, 96, 32)
    found = dequantized(made.tensors(truth), made.dtype, made.pack_method, 32)
    assert torch.equal(found, truth.values(0, 16, 0, 96))


@pytest.mark.parametrize("flavour", FLAVOURS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_region(flavour: str, data: st.DataObject) -> None:
    n, k = 8 * data.draw(st.integers(1, 5), "n/8"), 8 * data.draw(st.integers(1, 12), "k/8")
    group_size = data.draw(st.sampled_from([8, 24, 32, 128]), "group_size")
    made = FLAVOURS[flavour]
    truth = truth_of(flavour, n, k, group_size, data.draw(st.integers(0, 9), "seed"))
    tensors = made.tensors(truth)
    layer, _ = describe("quark-sym", None, group_size, tensors, **made.config(group_size))
    n0, k0 = data.draw(st.integers(0, n - 1), "n0"), data.draw(st.integers(0, k - 1), "k0")
    n1, k1 = data.draw(st.integers(n0 + 1, n), "n1"), data.draw(st.integers(k0 + 1, k), "k1")
    check(layer, tensors, Region(n0, n1, k0, k1), truth)


@pytest.mark.parametrize(("build", "name"), FLOAT8_NAMES.items())
def test_floats_of_8_bits(build: str, name: str) -> None:
    made = FLOAT8[build]
    truth = made.truth(40, 64, 32)
    tensors = made.tensors(truth)
    layer, _ = describe("quark-sym", None, 32, tensors, **made.config(32))
    region = Region(8, 28, 16, 56)
    check(layer, tensors, region, truth)
    assert layer.description == f"quark {name}{W8A8}"


def test_descriptions() -> None:
    found = {
        build: describe(build, made.truth(16, 64, 32), 32)[0].description
        for build, made in ALL_BUILDS.items()
        if build.startswith("quark")
    }
    assert found == {
        "quark-sym": "quark 4-bit g32, symmetric",
        "quark-asym": "quark 4-bit g32, zero points",
        "quark-mxfp4": "quark mxfp4 4-bit g32",
        "quark-fp8": f"quark fp8 8-bit per channel{W8A8}",
    }


def test_zero_points_of_symmetric_weights_may_be_left_out() -> None:
    made = QUARK_BUILDS["quark-sym"]
    truth = made.truth(16, 64, 32)
    tensors = made.tensors(truth)
    del tensors["weight_zero_point"]
    layer, _ = describe("quark-sym", None, 32, tensors)
    check(layer, tensors, Region(8, 16, 8, 40), truth)


def test_refuses_zero_points_of_symmetric_weights() -> None:
    layer, tensors = describe("quark-sym", QUARK_BUILDS["quark-sym"].truth(16, 64, 32), 32)
    put("weight_zero_point", (1, 0), 0x300)(tensors)
    with pytest.raises(
        WeightLoadError, match=rf"{MODULE}.weight_zero_point: found 1 zero points that are not 0"
    ):
        layer.packing.logical(cut(layer, tensors, layer.whole), layer, layer.whole)


@pytest.mark.parametrize("name", ["re:.*up_proj$", "re:model", UP, "*.up_proj", "*.u?_proj"])
def test_excluded_by_name_wildcard_and_regex(name: str, tmp_path: Path) -> None:
    edits = [make_plain(UP, 96, 64)]
    fmt = load(tmp_path, config={"exclude": [name]}, edits=edits)
    assert fmt.layer_of(UP) is None
    assert (problems_of(fmt, DOWN) == []) is (name != "re:model")


def test_what_lies_in_an_excluded_module_may_stay_as_it_is(tmp_path: Path) -> None:
    config = {"exclude": [UP.removesuffix(".up_proj")]}
    fmt = load(tmp_path, config=config, edits=[make_plain(UP, 96, 64)])
    assert fmt.layer_of(UP) is None
    assert fmt.layer_of(DOWN).description == "quark 4-bit g32, symmetric"


def test_config_and_file_have_to_agree(tmp_path: Path) -> None:
    fmt = load(tmp_path / "plain", edits=[make_plain(UP, 96, 64)])
    (problem,) = problems_of(fmt, UP)
    assert "an unquantized weight F16 [96, 64] although the config says" in str(problem)
    fmt = load(tmp_path / "packed", config={"exclude": ["*up_proj"]})
    (problem,) = problems_of(fmt, UP)
    assert "packed tensors (weight_scale, weight_zero_point) although the config" in str(problem)


def test_an_lm_head_is_quantized_unless_it_is_excluded(tmp_path: Path) -> None:
    made = QUARK_BUILDS["quark-sym"]
    tensors = made.tensors(made.truth(32, 64, 32))
    edits = [add(f"lm_head.{name}", tensor) for name, tensor in tensors.items()]
    fmt = load(tmp_path / "packed", edits=edits, config={"exclude": []})
    assert fmt.layer_of("lm_head").description == "quark 4-bit g32, symmetric"
    (problem,) = problems_of(load(tmp_path / "excluded", edits=edits), "lm_head")
    assert "although the config leaves this module unquantized" in str(problem)


def test_the_first_name_that_matches_wins_over_the_class(tmp_path: Path) -> None:
    made = QUARK_BUILDS["quark-sym"]
    edits = [
        add(f"{DOWN}.{name}", tensor)
        for name, tensor in made.tensors(made.truth(64, 96, 16)).items()
    ]
    config = {
        "global_quant_config": layer_config({**INT4, "dtype": "int3"}),
        "layer_type_quant_config": {"Linear": layer_config(INT4), "Conv2d": layer_config(FP8)},
        "layer_quant_config": {
            "re:.*down_proj": layer_config({**INT4, "group_size": 16}),
            "*": layer_config(INT4, {**FP8, "is_dynamic": True}),
        },
    }
    fmt = load(tmp_path / "names", edits=edits, config=config)
    assert fmt.layer_of(DOWN).description == "quark 4-bit g16, symmetric"
    assert fmt.layer_of(UP).activations == "fp8_e4m3, dynamic"
    del config["layer_quant_config"]["*"]
    assert load(tmp_path / "class", edits=edits, config=config).layer_of(UP).activations == ""
    config["layer_type_quant_config"] = {}
    (problem,) = problems_of(load(tmp_path / "all", edits=edits, config=config), UP)
    assert "found weights of int3 per_group; supported: int4 per_group, uint4" in str(problem)


def test_a_name_whose_weight_is_null_stays_unquantized(tmp_path: Path) -> None:
    names = {"*up_proj": layer_config(None)}
    edits = [make_plain(UP, 96, 64)]
    assert load(tmp_path, edits=edits, config={"layer_quant_config": names}).layer_of(UP) is None


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, ""),
        ({**FP8, "is_dynamic": True}, "fp8_e4m3, dynamic"),
        ([{**FP8, "dtype": "fp4"}, FP8], "fp4 over fp8_e4m3, static"),
        (7, "7"),
    ],
)
def test_quantized_activations_are_told(inputs: object, words: str, tmp_path: Path) -> None:
    edits = [add(f"{UP}.input_scale", torch.tensor(0.5))]
    fmt = load(tmp_path, config=global_config({}, input_tensors=inputs), edits=edits)
    assert fmt.layer_of(UP).activations == words
    assert fmt.layer_of(UP).tensor("input_scale") is not None


@pytest.mark.parametrize("where", ["kv_cache_quant_config", "layer_quant_config"])
def test_a_quantized_kv_cache(where: str, tmp_path: Path) -> None:
    of_outputs = {**layer_config(INT4), "output_tensors": FP8}
    named = dict.fromkeys(("*k_proj", "*v_proj"), of_outputs)
    config = {"layer_quant_config": named, where: named}
    config["export"] = {"pack_method": "reorder", "kv_cache_group": ["*k_proj", "*v_proj"]}
    if where == "kv_cache_quant_config":
        config["export"]["kv_cache_group"] = []
    edits = [kv_scales((0.03, 0.04), spelling="fp8")]
    fmt = load(tmp_path, config=config, edits=edits)
    assert served_kv_dtype(fmt, "auto") == "fp8"
    assert kv_cache_problems(fmt) == []
    assert not [problem for module in fmt.modules() for problem in problems_of(fmt, module)]
    (problem,) = kv_cache_problems(load(tmp_path / "without", config=config))
    assert "in the config and no k_scale or v_scale in the file" in str(problem)


ROTATED = {"name": "rotation", "r1": True, "r2": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"export": None}, r"export.pack_method None; supported by quark: pack_method reorder or"),
        ({"export": {"pack_method": ["x"]}}, r"export.pack_method \['x'\]"),
        ({"global_quant_config": None}, "found None as global_quant_config; .*a JSON object that"),
        ({"layer_quant_config": ["x"]}, r"layer_quant_config \['x'\]; .*layer_quant_config as a"),
        ({"layer_quant_config": {"*q_proj": 3}}, r"found 3 as \*q_proj in layer_quant_config;"),
        ({"exclude": "lm_head"}, "exclude 'lm_head'; .*a list of names"),
        ({"exclude": ["re:["]}, r"the regex '\['"),
        (
            {"algo_config": [{**ROTATED, "r3": True, "online_r1_rotation": True}]},
            r"r3, online_r1_rotation in algo_config \(rotated activations\); .*\(r1, r2\)",
        ),
        (
            {"kv_cache_quant_config": {"*k_proj": {"output_tensors": {**FP8, "dtype": "int8"}}}},
            r"a KV cache of int8 'per_tensor' \(\*k_proj\); .* of fp8_e4m3 per_tensor",
        ),
    ],
)
def test_refuses_config(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        load(tmp_path, config=config)


def test_rotations_that_are_merged_are_the_weights(tmp_path: Path) -> None:
    assert problems_of(load(tmp_path, config={"algo_config": [ROTATED]}), UP) == []


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (global_config({"dtype": "uint4"}), "uint4 weights with symmetric True; supported: sym"),
        (global_config({"symmetric": None}), "int4 weights with symmetric None; supported: symm"),
        (global_config({"is_dynamic": True}), "int4 weights with is_dynamic True; supported: is"),
        (global_config({"ch_axis": 0}), "int4 weights with ch_axis 0; supported: ch_axis -1 or 1"),
        (global_config({"qscheme": "per_channel"}), "weights of int4 per_channel; supported: int4"),
        (global_config({"group_size": 12}), "group_size 12; supported: multiples of 8"),
        (global_config({"group_size": -1}), "group_size -1; supported: multiples of 8"),
        (global_config({}, weight=[INT4, FP8]), "weights of int4 over fp8_e4m3 None; "),
        (global_config({"dtype": "fp4", "group_size": 16}), "fp4 weights with group_size 16; sup"),
        (global_config({"dtype": "fp4"}), "fp4 weights with scale_format None; supported: scale_"),
        (
            global_config({**FP8, "qscheme": "per_channel", "ch_axis": 1}),
            "fp8_e4m3 weights with ch",
        ),
        (global_config({**FP8, "qscheme": "per_block"}), "block_size None; supported: two sizes ["),
        (global_config({**FP8, "dtype": "fp6_e2m3"}), "weights of fp6_e2m3 per_tensor; supported"),
        (global_config({}, weight="x"), "weights of 'x' None; supported: int4 per_group, uint4"),
        (global_config({}, bias=FP8), "quantized bias (fp8_e4m3); supported: bias null"),
        (
            global_config({}, output_tensors=FP8),
            "quantized output_tensors (fp8_e4m3); supported: out",
        ),
    ],
)
def test_refuses_layers(config: dict[str, Any], found: str, tmp_path: Path) -> None:
    (problem,) = problems_of(load(tmp_path, config=config), UP)
    assert f"found {found}" in str(problem)


def test_asymmetric_weights_have_zero_points(tmp_path: Path) -> None:
    fmt = load(tmp_path, "quark-asym", edits=[drop(f"{UP}.weight_zero_point")])
    (problem,) = problems_of(fmt, UP)
    assert "no tensor weight_zero_point (only weight, weight_scale)" in str(problem)
