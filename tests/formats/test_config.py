"""Configs as a whole: which are refused and why, which are accepted, and what they leave alone."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import checkpoints
from checkpoints import add, make_plain, with_fields, write_checkpoint
from fusedq_kernels import reference
from layers import problems_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import FusedQError, UnsupportedCheckpoint
from vllm_fusedq.formats import FORMATS, CheckpointFormat, format_for

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def load(path: Path, build: str = "awq", **options: Any) -> CheckpointFormat:
    write_checkpoint(path, build, **options)
    return format_for(read_checkpoint(path))


@pytest.mark.parametrize("method", ["gguf", "mxfp4", "hqq", "exl2", 7, ["awq"]])
def test_unknown_quant_method(method: object, tmp_path: Path) -> None:
    message = f"quant_method .* in quantization_config; supported: {', '.join(FORMATS)}; drop"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        load(tmp_path, config={"quant_method": method})


def test_no_quant_method(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="found no quant_method in quantization_config"):
        load(tmp_path, config={"quant_method": None})


GROUP = checkpoints.compressed_tensors_config(32)["config_groups"]["group_0"]


def groups(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**GROUP, **changes}}}


def weights(**changes: Any) -> dict[str, Any]:
    return groups(weights={**GROUP["weights"], **changes})


REFUSED = {
    "awq-bits": (
        "awq",
        {"bits": 8},
        "bits 8, made by a tool that it does not name; supported by awq: 4 bits by any tool, "
        "2, 3, 5, 6, 7, 8 bits where meta.quantizer in the config names gptqmodel",
    ),
    "awq-bits-tool": (
        "awq",
        {"bits": 8, "meta": {"quantizer": ["other:1.0"]}},
        "bits 8, made by other; ",
    ),
    "awq-bits-meta": (
        "awq",
        {"bits": 8, "meta": 5},
        "bits 8, made by a tool that it does not name",
    ),
    "awq-bits-9": (
        "awq",
        {"bits": 9, "meta": {"quantizer": "gptqmodel:7.7.0"}},
        "bits 9, made by gptqmodel; ",
    ),
    "awq-bits-gemv": (
        "awq-8bit",
        {"version": "gemv"},
        "bits 8 with version gemv; supported by awq: 4 bits with version gemv and gemv_fast",
    ),
    "awq-group": (
        "awq",
        {"group_size": 12},
        "group_size 12; .* -1 or a multiple of 8; .*q_group_size 32",
    ),
    "awq-group-0": ("awq", {"group_size": 0}, "group_size 0;"),
    "awq-group-bool": ("awq", {"group_size": True}, "group_size True;"),
    "awq-marlin": (
        "awq",
        {"version": "Marlin"},
        "version 'Marlin'; .*gemm, gemv, .*quantize again",
    ),
    "awq-gemv-group": ("awq", {"version": "gemv", "group_size": 96}, "group_size 96 with version"),
    "awq-gemv-channel": (
        "awq",
        {"version": "gemv_fast", "group_size": -1},
        "-1 with version gemv_",
    ),
    "awq-zero-point": ("awq", {"zero_point": None}, "zero_point None; .*true or false"),
    "awq-dynamic": ("awq", {"dynamic": {"a": {}}}, "per-module overrides"),
    "awq-excluded": ("awq", {"modules_to_not_convert": "gate"}, "'gate'; .*a list of names"),
    "gptq-bits": ("gptq-sym", {"bits": 5}, "bits 5; supported by gptq: bits 2, 3, 4, 8"),
    "gptq-bits-type": ("gptq-sym", {"bits": 4.0}, "bits 4.0;"),
    "gptq-group": ("gptq-sym", {"group_size": None}, "group_size None"),
    "gptq-marlin": ("gptq-sym", {"checkpoint_format": "marlin"}, "'marlin'; .*gptq or gptq_v2"),
    "gptq-is-marlin": ("gptq-sym", {"is_marlin_format": True}, "checkpoint_format 'marlin'"),
    "gptq-pack": ("gptq-sym", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    "gptq-rotation": ("gptq-sym", {"rotation": "hadamard"}, "rotation 'hadamard'"),
    "gptq-sym": ("gptq-sym", {"sym": "yes"}, "sym 'yes'"),
    "gptq-override-bits": (
        "gptq-sym",
        {"dynamic": {"+:up": {"bits": 6}}},
        r"bits 6 in the dynamic rule '\+:up'; .*bits 2, 3, 4, 8",
    ),
    "gptq-override-group": (
        "gptq-sym",
        {"dynamic": {"up": {"group_size": 12}}},
        "QuantizeConfig 32",
    ),
    "gptq-override-sym": ("gptq-sym", {"dynamic": {"up": {"sym": 1}}}, "sym 1 in the dynamic rule"),
    "gptq-override-pack": (
        "gptq-sym",
        {"dynamic": {"up": {"pack_dtype": "int8"}}},
        "'int8' in the",
    ),
    "gptq-override-unknown": (
        "gptq-sym",
        {"dynamic": {"up": {"mse": 2.4, "adapter": {"rank": 8}}}},
        "adapter {'rank': 8} in the dynamic rule 'up'; .*overrides of bits, desc_act, group_size",
    ),
    "gptq-override-type": (
        "gptq-sym",
        {"dynamic": {"up": 8}},
        "8 in the dynamic rule 'up'; .*a JSON object",
    ),
    "gptq-dynamic-type": ("gptq-sym", {"dynamic": "x"}, "dynamic 'x'; .*a JSON object"),
    "gptq-blocks": ("gptq-sym", {"modules_in_block_to_quantize": 5}, "quantize 5; .*lists of"),
    "gptq-regex": ("gptq-sym", {"dynamic": {"-:(": {}}}, "the regex '\\('"),
    "ct-kv": ("ct-sym", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme with type None"),
    "ct-sparse": ("ct-sym", {"sparsity_config": {"format": "sparse-24"}}, "sparse weights"),
    "ct-transform": ("ct-sym", {"transform_config": {"a": 1}}, "transformed weights"),
    "ct-no-groups": ("ct-sym", {"config_groups": {}}, "config_groups {}; .*at least one group"),
    "ct-preset": ("ct-sym", {"config_groups": {"W4A16": ["Linear"]}}, "W4A16 without a weights"),
    "ct-inputs": (
        "ct-sym",
        groups(input_activations=["int8"]),
        r"input_activations \['int8'\] in group_0",
    ),
    "ct-outputs": ("ct-sym", groups(output_activations={"num_bits": 8}), "quantized outputs"),
    "ct-format": ("ct-sym", {"format": "marlin-24"}, "format 'marlin-24' of group_0"),
    "ct-group-format": (
        "ct-sym",
        groups(format="sparse-bitmask"),
        "'sparse-bitmask' of group_0; .*pack-quantized or int-quantized or naive-quantized",
    ),
    "ct-bits": (
        "ct-sym",
        weights(num_bits=1),
        "1-bit int weights in group_0, pack-quantized; .*2- to 8-bit int",
    ),
    "ct-float": ("ct-sym", weights(type="float"), "4-bit float weights"),
    "ct-dynamic": ("ct-sym", weights(dynamic=True), "dynamic weights"),
    "ct-symmetric": ("ct-sym", weights(symmetric="no"), "symmetric 'no'"),
    "ct-tensor": ("ct-sym", weights(strategy="tensor"), "strategy 'tensor' in group_0"),
    "ct-actorder": ("ct-sym", weights(actorder="random"), "actorder 'random' .*static, weight, gr"),
    "ct-targets": ("ct-sym", groups(targets=[3]), r"targets \[3\]; .*a list of names"),
    "ct-ignore": ("ct-sym", {"ignore": "lm_head"}, "ignore 'lm_head'"),
    "ct-regex": ("ct-sym", {"ignore": ["re:["]}, "the regex '\\['"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_config(case: str, tmp_path: Path) -> None:
    build, config, message = REFUSED[case]
    with pytest.raises(UnsupportedCheckpoint, match=message) as caught:
        load(tmp_path, build, config=config)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("build", ["awq", "gptq-sym", "ct-sym"])
def test_refuses_a_checkpoint_without_packed_tensors(build: str, tmp_path: Path) -> None:
    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not name.endswith(".weight")]:
            del tensors[name]

    with pytest.raises(UnsupportedCheckpoint, match=r"no module with packed tensors .*quantize"):
        load(tmp_path, build, edits=[unpack])


def test_refuses_scaled_activations(tmp_path: Path) -> None:
    edit = add("model.layers.0.mlp.act.scales", torch.ones(96))
    with pytest.raises(UnsupportedCheckpoint, match=r"scaled activation \(model.layers.0.mlp.act"):
        load(tmp_path, edits=[edit])


ACCEPTED = {
    "awq-upper": ("awq", {"version": "GEMM"}),
    "awq-no-zero-point": ("awq", {"zero_point": False}),
    "awq-gptqmodel": ("awq", {"version": None, "checkpoint_format": "gemm"}),
    "gptq-static-groups": ("gptq-sym", {"desc_act": True, "static_groups": True}),
    "gptq-no-format": ("gptq-sym", {"checkpoint_format": None}),
    "ct-static": ("ct-sym", weights(actorder="static")),
    "ct-weight": ("ct-sym", weights(actorder="weight")),
    "ct-no-strategy": ("ct-sym", weights(strategy=None)),
    "ct-dense": ("ct-sym", {"sparsity_config": {"format": "dense"}}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_config(case: str, tmp_path: Path) -> None:
    build, config = ACCEPTED[case]
    fmt = load(tmp_path, build, config=config)
    assert [problems_of(fmt, module) for module in fmt.modules()] == [[]] * 7


def test_accepts_activation_order_in_one_group(tmp_path: Path) -> None:
    fmt = load(tmp_path, "gptq-sym", group_size=-1, config={"desc_act": True})
    assert problems_of(fmt, UP) == []


def test_a_group_by_name_wins_over_the_class(tmp_path: Path) -> None:
    asym = checkpoints.compressed_tensors_config(16, symmetric=False)["config_groups"]["group_0"]
    groups = {"all": GROUP, "down": {**asym, "targets": ["re:.*down_proj"]}}
    truth = checkpoints.random_truth(64, 96, 16, zero_range=(0, 15))
    made = checkpoints.compressed_tensors_tensors(truth)
    edits = [add(f"{DOWN}.{name}", tensor) for name, tensor in made.items()]
    fmt = load(tmp_path, "ct-sym", config={"config_groups": groups}, edits=edits)
    layers = [fmt.layer_of(module) for module in (UP, DOWN)]
    assert [str(layer.description) for layer in layers if layer] == [
        "compressed-tensors 4-bit g32, symmetric",
        "compressed-tensors 4-bit g16, zero points",
    ]


def test_modules_that_no_group_targets_are_left_alone(tmp_path: Path) -> None:
    names = [f"re:.*{name}_proj" for name in ("q", "k", "v", "o", "gate", "down")]
    fmt = load(tmp_path, "ct-sym", config=groups(targets=names), edits=[make_plain(UP, 96, 64)])
    assert fmt.layer_of(UP) is None
    assert fmt.layer_of(DOWN) is not None


def test_rules_of_gptqmodel_by_module(tmp_path: Path) -> None:
    """The first rule that matches decides; what it does not override is the config's."""
    layer = r".*\.layers\.0\."
    dynamic = {
        f"-:{layer}self_attn": {},
        f"+:{layer}mlp.down": {"group_size": 16, "sym": False, "desc_act": True, "bits": 4},
        f"{layer}mlp": {"group_size": -1, "mse": 2.4},
        r"+:.*(down|gate)_proj": {"group_size": 8},
        r"+:.*up_proj": {},
    }
    truths = {
        module: with_fields(
            checkpoints.random_truth(n, k, group_size, zero_range=zeros), g_idx=g_idx
        )
        for module, n, k, group_size, zeros, g_idx in (
            (DOWN, 64, 96, 16, (1, 15), np.random.default_rng(0).permutation(96) // 16),
            (UP, 96, 64, -1, None, None),
            (UP.replace("up", "gate"), 96, 64, -1, None, None),
            (DOWN.replace(".0.", ".1."), 64, 96, 8, None, None),
            (UP.replace("up", "gate").replace(".0.", ".1."), 96, 64, 8, None, None),
        )
    }
    edits = [
        add(f"{module}.{name}", tensor)
        for module, truth in truths.items()
        for name, tensor in checkpoints.gptq_tensors(truth).items()
    ]
    edits += [make_plain(f"model.layers.0.self_attn.{name}_proj", 64, 64) for name in "qkvo"]
    fmt = load(tmp_path, "gptq-sym", layers=2, config={"dynamic": dynamic}, edits=edits)
    assert [problem for module in fmt.modules() for problem in problems_of(fmt, module)] == []
    assert fmt.layer_of("model.layers.0.self_attn.q_proj") is None
    expected = {
        DOWN: "gptq 4-bit g16, zero points, act-order",
        UP: "gptq 4-bit per channel, symmetric",
        DOWN.replace(".0.", ".1."): "gptq 4-bit g8, symmetric",
        UP.replace(".0.", ".1."): "gptq 4-bit g32, symmetric",
        "model.layers.1.self_attn.q_proj": "gptq 4-bit g32, symmetric",
    }
    assert {module: fmt.layer_of(module).description for module in expected} == expected
    stored = load_file(tmp_path / "model.safetensors")
    for module, truth in truths.items():
        layer = fmt.layer_of(module)
        tensors = {t.name: stored[f"{module}.{t.name}"] for t in layer.tensors}
        weight = layer.packing.logical(tensors, layer, layer.whole)
        values = reference.dequantize(weight).double()
        found = values if weight.perm is None else values[:, weight.perm.argsort()]
        assert torch.equal(found, truth.values(0, layer.n, 0, layer.k)), module


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = {
    "awq": ["bits", "group_size", "version", "zero_point", "modules_to_not_convert", "dynamic"],
    "gptq-sym": [
        "bits",
        "group_size",
        "sym",
        "desc_act",
        "checkpoint_format",
        "pack_dtype",
        "dynamic",
        "modules_in_block_to_quantize",
    ],
    "ct-sym": ["format", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config"],
}


@pytest.mark.parametrize("build", KEYS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nonsense_in_a_config_is_refused_or_harmless(
    build: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"nonsense-{build}"
    if not path.exists():
        write_checkpoint(path, build)
    whole = read_checkpoint(path)
    config = {**whole.quant_config, data.draw(st.sampled_from(KEYS[build])): data.draw(JSON)}
    if build == "ct-sym" and data.draw(st.booleans()):
        changed = {
            **GROUP["weights"],
            data.draw(st.sampled_from([*GROUP["weights"]])): data.draw(JSON),
        }
        config |= groups(weights=changed, targets=data.draw(JSON))
    with contextlib.suppress(FusedQError):
        fmt = format_for(replace(whole, quant_config=config))
        for module in fmt.modules():
            problems_of(fmt, module)
