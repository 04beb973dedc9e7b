"""AutoRound's configs: which tensors they name, and the options that modules have of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import (
    ALL_BUILDS,
    Edit,
    Tensors,
    add,
    make_plain,
    rename,
    with_fields,
    write_checkpoint,
)
from layers import MODULE, check, cut, describe, problems_of
from loading import TARGETS, assert_exact, load
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.errors import UnsupportedCheckpoint, WeightLoadError
from vllm_fusedq.formats import CheckpointFormat, Finding, format_for, settle
from vllm_fusedq.plan.advice import listed_otherwise
from vllm_fusedq.plan.model import plan_model

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
HEAD = "lm_head"


def read(path: Path, build: str = "autoround-sym", **options: Any) -> CheckpointFormat:
    write_checkpoint(path, build, **options)
    return format_for(read_checkpoint(path))


def stored_as(module: str, build: str, n: int, k: int, group_size: int = 32) -> Edit:
    """Store a module as another build does."""
    truth = ALL_BUILDS[build].truth(n, k, group_size, seed=7)

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]
        for suffix, tensor in ALL_BUILDS[build].tensors(truth).items():
            tensors[f"{module}.{suffix}"] = tensor

    return edit


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
@pytest.mark.parametrize(
    ("build", "named"),
    [
        ("autoround-4bit-minus-one", {"packing_format": "auto_round:auto_gptq"}),
        ("autoround-4bit-minus-one", {"packing_format": "auto_round:gptq"}),
        ("autoround-4bit-minus-one", {"packing_format": "auto"}),
        ("autoround-4bit-minus-one", {}),
        ("autoround-4bit-minus-one", {"backend": "auto"}),
        ("autoround-4bit-minus-one", {"backend": "gptq:exllamav2"}),
        ("autoround-4bit-minus-one", {"backend": "auto_gptq:triton"}),
        ("autoround-4bit-minus-one", {"backend": "auto_round:gptq:exllamav2"}),
        ("autoround-asym", {"packing_format": "auto_round"}),
        ("autoround-asym", {"backend": "auto_round:exllamav2"}),
        ("autoround-asym", {"packing_format": "auto_round", "backend": "gptq:marlin"}),
        ("autoround-gptqmodel", {"packing_format": "auto_round:gptqmodel"}),
        ("autoround-awq", {"packing_format": "auto_round:auto_awq"}),
        ("autoround-awq", {"packing_format": "auto_round:awq"}),
        ("autoround-awq", {"backend": "auto_round:awq"}),
    ],
)
def test_every_name_of_a_packing(
    tmp_path: Path, build: str, named: dict[str, str], method: str
) -> None:
    config = {"quant_method": method, "packing_format": None, **named}
    truths = write_checkpoint(tmp_path, build, hidden=128, intermediate=192, config=config)
    checkpoint = read_checkpoint(tmp_path)
    for tp_size, rank in ((1, 0), (2, 1)):
        target = TARGETS["gpu"]
        for plan in plan_model(checkpoint, target, tp_size, ranks=[rank]).layers:
            assert_exact(load(plan, tmp_path), truths)


def test_a_config_in_its_own_file_names_no_method(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "autoround-sym")
    whole = read_checkpoint(tmp_path)
    config = {"bits": 4, "group_size": 32, "sym": True}
    own = Checkpoint(whole.path, {}, config, "quantization_config.json", whole.tensors)
    assert format_for(own).name == "auto-round"


REFUSED = {
    "packing": (
        {"packing_format": "auto_round:llm_compressor"},
        "found packing_format 'auto_round:llm_compressor'; supported by auto-round: auto_round, "
        "auto_round:auto_gptq, auto_round:gptqmodel, auto_round:auto_awq; export again with format",
    ),
    "packing-kernel": (
        {"packing_format": None, "backend": "auto_gptq:marlin"},
        "found packing_format 'auto_gptq:marlin'; ",
    ),
    "packing-type": ({"packing_format": 4}, "found packing_format 4; "),
    "mx": ({"data_type": "mx_fp", "packing_format": "auto_round"}, "found data_type 'mx_fp'; "),
    "nv": ({"data_type": "nv_fp4"}, "found data_type 'nv_fp4'; supported by auto-round: data_type"),
    "fp8": ({"data_type": "fp", "bits": 8, "group_size": [128, 128]}, "found data_type 'fp'; "),
    "act": (
        {"act_bits": 8},
        r"found act_bits 8 \(quantized activations\); .*: activations in 16 bits",
    ),
    "act-type": ({"act_bits": "8"}, r"found act_bits '8' \(quantized activations\); "),
    "bits": (
        {"bits": 1},
        "found bits 1; supported by auto-round: bits 2, 3, 4, 5, 6, 7, 8 with packing auto_gptq; ",
    ),
    "bits-awq": (
        {"bits": 8, "packing_format": "auto_round:auto_awq"},
        "found bits 8; supported by auto-round: bits 4, 5, 6, 7 with packing auto_awq; ",
    ),
    "bits-type": ({"bits": True}, "found bits True; "),
    "bits-between": ({"bits": 12}, "found bits 12; "),
    "sym": ({"sym": "yes"}, "found sym 'yes'; supported by auto-round: sym true or false; "),
    "group": ({"group_size": None}, "found group_size None; .* with AutoRound's group_size 32, "),
    "blocks": (
        {"block_name_to_quantize": [7]},
        r"found block_name_to_quantize \[7\]; supported by auto-round: names of blocks; ",
    ),
    "blocks-type": ({"block_name_to_quantize": 7}, "found block_name_to_quantize 7; "),
    "rotation": (
        {"rotation_config": {"algorithm": "hadamard"}},
        r"found rotation_config .*\(rotated weights\); .*: weights of linear layers alone; ",
    ),
    "spinquant": ({"spinquant_config": {"r1": True}}, r"spinquant_config .*\(rotated weights\)"),
    "kv": ({"static_kv_dtype": "fp8"}, r"static_kv_dtype 'fp8' \(a quantized KV cache\); "),
    "attention": (
        {"static_attention_dtype": "fp8"},
        r"static_attention_dtype 'fp8' \(quantized attention\); ",
    ),
    "extra": ({"extra_config": ["x"]}, r"found extra_config \['x'\]; .*: extra_config as a JSON"),
    "extra-entry": (
        {"extra_config": {UP: 4}},
        f"found 4 in extra_config of '{UP}'; supported by auto-round: a JSON object of options; ",
    ),
    "extra-bits": ({"extra_config": {UP: {"bits": 9}}}, "found bits 9 in extra_config of "),
    "extra-act": (
        {"extra_config": {UP: {"act_bits": 8}}},
        r"found act_bits 8 in extra_config of '.*up_proj' \(quantized activations\); ",
    ),
    "extra-type": (
        {"extra_config": {UP: {"data_type": "fp"}}},
        "found data_type 'fp' in extra_config of ",
    ),
    "extra-sym": ({"extra_config": {UP: {"sym": 1}}}, "found sym 1 in extra_config of "),
    "extra-regex": ({"extra_config": {"[": {"bits": 8}}}, r"found the regex '\[' \("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(tmp_path: Path, case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UnsupportedCheckpoint, match=message):
        read(tmp_path, config=config)


KEYS = {
    "name": UP,
    "part": "up_proj",
    "regex": r".*up_proj.*",
    "prefix": "model.language_model.layers.0.mlp.up_proj",
    "no prefix": "layers.0.mlp.up_proj",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_module_with_options_of_its_own(tmp_path: Path, key: str) -> None:
    # Entries of the config's own scheme are null
    options = {"bits": 7, "group_size": 16, "sym": False, "act_bits": None, "super_bits": None}
    # The first regex that matches decides, a name before any
    extra = {KEYS[key]: options, ".*mlp.*": {"bits": 3, "sym": True}}
    config = {"packing_format": "auto_round", "extra_config": extra}
    sizes = {"gate_proj": (96, 64), "down_proj": (64, 96)}
    edits = [
        stored_as(UP, "autoround-7bit-asym", 96, 64, 16),
        *(stored_as(f"model.layers.0.mlp.{x}", "autoround-3bit-sym", *sizes[x]) for x in sizes),
    ]
    fmt = read(tmp_path, "autoround-sym", config=config, edits=edits)
    found = {module.rpartition(".")[2]: fmt.layer_of(module) for module in fmt.modules()}
    words = {name: layer.description for name, layer in found.items() if layer}
    assert words["up_proj"] == "auto-round 7-bit g16, zero points, resident as 8-bit"
    assert words["down_proj"] == "auto-round 3-bit g32, symmetric, resident as 4-bit"
    assert words["q_proj"] == "auto-round 4-bit g32, symmetric"
    assert len(words) == 7


@pytest.mark.parametrize("key", KEYS)
def test_a_module_that_is_left_alone(tmp_path: Path, key: str) -> None:
    config = {"extra_config": {KEYS[key]: {"bits": 16, "data_type": "fp"}}}
    fmt = read(tmp_path / "plain", config=config, edits=[make_plain(UP, 96, 64)])
    assert fmt.layer_of(UP) is None
    assert UP not in fmt.modules()
    assert fmt.layer_of(DOWN) is not None
    said = [each.message for each in listed_otherwise(fmt, [UP])]
    assert len(said) == (key == "prefix")
    (problem,) = problems_of(read(tmp_path / "packed", config=config), UP)
    assert "although the config leaves this module unquantized" in problem.found
    assert problem.fix == "correct bits 16 in extra_config in the config"


@pytest.mark.parametrize(
    "blocks",
    [
        "model.layers",
        "visual.blocks, model.layers",
        ["model.layers"],
        [["model.layers.0", "model.layers.1"]],
        "model.language_model.layers",
    ],
)
@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names"])
def test_blocks_by_the_beginning_of_their_names(tmp_path: Path, key: str, blocks: object) -> None:
    other = "mtp.layers.0.mlp.up_proj"
    edits = [rename("model.layers.1.mlp.up_proj", other), make_plain(other, 96, 64)]
    fmt = read(tmp_path, layers=2, config={key: blocks}, edits=edits)
    assert fmt.layer_of(other) is None
    assert len(fmt.modules()) == 13
    assert all(fmt.layer_of(module) for module in fmt.modules())


def test_packed_outside_the_blocks(tmp_path: Path) -> None:
    fmt = read(tmp_path, layers=2, config={"block_name_to_quantize": "model.layers.0"})
    (problem,) = problems_of(fmt, "model.layers.1.mlp.up_proj")
    assert "although the config leaves this module unquantized" in problem.found


@pytest.mark.parametrize("key", [HEAD, ".*lm_head", "model.language_model.lm_head"])
def test_a_quantized_lm_head(tmp_path: Path, key: str) -> None:
    config = {"extra_config": {key: {"bits": 8, "sym": True, "data_type": "int"}}}
    edits = [stored_as(HEAD, "autoround-8bit-sym", 32, 64)]
    layer = read(tmp_path, config=config, edits=edits).layer_of(HEAD)
    assert layer is not None
    assert layer.description == "auto-round 8-bit g32, symmetric"


def test_an_lm_head_and_a_projector_that_a_regex_of_the_blocks_matches(tmp_path: Path) -> None:
    """The tool applies a regex to other layers only where it matches none in the blocks."""
    edits = [add("projector.weight", torch.zeros(64, 64, dtype=torch.float16))]
    config = {"extra_config": {".*(_proj|lm_head|projector)": {"bits": 4}}}
    fmt = read(tmp_path, config=config, edits=edits)
    assert fmt.layer_of(HEAD) is None
    assert fmt.layer_of("projector") is None
    assert len(fmt.modules()) == 7


def test_a_projector_that_has_an_entry(tmp_path: Path) -> None:
    edits = [stored_as("projector", "autoround-sym", 64, 64)]
    config = {"extra_config": {"projector": {"bits": 4}}}
    assert read(tmp_path / "yes", config=config, edits=edits).layer_of("projector") is not None
    (problem,) = problems_of(read(tmp_path / "no", edits=edits), "projector")
    assert "although the config leaves this module unquantized" in problem.found


def test_an_lm_head_that_the_config_does_not_name(tmp_path: Path) -> None:
    fmt = read(tmp_path, edits=[stored_as(HEAD, "autoround-sym", 32, 64)])
    (problem,) = problems_of(fmt, HEAD)
    assert problem.fix == "correct the entry lm_head in extra_config in the config"


def test_nothing_quantized_but_entries(tmp_path: Path) -> None:
    edits = [
        make_plain(f"model.layers.0.{name}", 64, 64)
        for name in (*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.down_proj")
    ]
    config = {"bits": 16, "extra_config": {UP: {"bits": 4, "sym": True}}}
    fmt = read(tmp_path, config=config, edits=edits)
    assert fmt.modules() == [UP]
    assert fmt.layer_of(UP) is not None


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_interleaved_words_by_hand(bits: int) -> None:
    """Out_feature n holds n: the first eight codes of a word are those of 0, 2, 4, 6, 1, 3, ..."""
    truth = ALL_BUILDS[f"autoround-{bits}bit-awq"].truth(32, 32, 32)
    codes = np.arange(32, dtype=np.uint8)[:, None].repeat(32, 1)
    truth = with_fields(truth, codes=codes)
    layer, tensors = describe(f"autoround-{bits}bit-awq", truth, 32)
    order = [8 * i + j for i in range(4) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
    stream = sum(n << bits * place for place, n in enumerate(order))
    words = [stream >> 32 * index & 0xFFFFFFFF for index in range(bits)]
    assert (tensors["qweight"][0].numpy().view(np.uint32) == words).all()
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_zero_points_of_zero_minus_one(bits: int) -> None:
    """`pack_bitstream` masks every field by itself."""
    truth = ALL_BUILDS[f"autoround-{bits}bit-asym"].truth(64, 64, 32)
    truth.zeros[::5] = 0
    stored = with_fields(truth, zeros=(truth.zeros - 1) & (2**bits - 1))
    tensors = ALL_BUILDS[f"autoround-{bits}bit-asym"].tensors(stored)
    config = {"packing_format": "auto_round:auto_gptq", "bits": bits}
    layer, _ = describe("autoround-asym", None, 32, tensors, **config)
    check(layer, tensors, layer.whole, truth)


def test_refusals_name_the_setting_of_the_tool() -> None:
    build = ALL_BUILDS["autoround-4bit-minus-one"]
    layer, tensors = describe("autoround-4bit-minus-one", build.truth(16, 64, 32), 32)
    tensors["qzeros"][1, 0] |= -1 << 4
    message = (
        f"{MODULE}.qzeros: found stored zero points 15 side by side, which in packing_format "
        "auto_round:auto_gptq are 16, .*; set packing_format to auto_round in the config if"
    )
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


def test_the_values_decide_between_the_conventions() -> None:
    """What `auto_round` stores under the name of `auto_round:auto_gptq`, and the refusals."""
    truth = ALL_BUILDS["autoround-sym"].truth(64, 64, 32)
    stored = with_fields(truth, zeros=np.full((64, 2), 8, np.uint8))
    tensors = ALL_BUILDS["autoround-asym"].tensors(stored)
    layer, _ = describe("autoround-sym", None, 32, tensors)
    found = layer.packing.evidence(cut(layer, tensors, layer.whole), layer, layer.whole)
    why = "sym is true and every stored zero point 8"
    assert found == Finding("auto_round:auto_gptq", "auto_round", why, "packing_format")
    check(layer, tensors, layer.whole, truth)
    other = Finding("auto_round:auto_gptq", "auto_round:auto_gptq", "", "packing_format")
    with pytest.raises(WeightLoadError, match="supported: one packing_format for all; set it to "):
        settle({"a": found, "b": other})
    codes = np.full((64, 1024), 9, np.uint8)
    zeros = np.full((64, 32), 8, np.uint8)
    scales = torch.ones(64, 32, dtype=torch.float16)
    wrong = with_fields(truth, codes=codes, zeros=zeros, scales=scales)
    tensors = ALL_BUILDS["autoround-asym"].tensors(wrong)
    layer, _ = describe("autoround-asym", None, 32, tensors)
    message = (
        "codes that average 1.00 above .* average 0 in packing_format auto_round and 1 in "
        "auto_round:auto_gptq; set packing_format to auto_round:auto_gptq in the config"
    )
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.evidence(tensors, layer, layer.whole)
