"""Which modules count as quantized, how they are described, and every problem of one module."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import BUILDS, add, drop, make_plain, rename, replace, write_checkpoint
from fusedq_kernels.types import WeightType
from layers import problems_of
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.formats import FORMATS, CheckpointFormat, Dim, LayerFormat, format_for

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
HEAD = "lm_head"


def load(path: Path, build: str = "awq", **options: Any) -> CheckpointFormat:
    write_checkpoint(path, build, **options)
    return format_for(read_checkpoint(path))


def problem_of(fmt: CheckpointFormat, module: str) -> str:
    """The text of the only problem of a module."""
    (problem,) = problems_of(fmt, module)
    return str(problem)


@pytest.mark.parametrize("group_size", [8, 32, 48, -1])
@pytest.mark.parametrize("build", BUILDS)
def test_describes_every_layer(build: str, group_size: int, tmp_path: Path) -> None:
    truths = write_checkpoint(tmp_path, build, layers=2, group_size=group_size)
    fmt = pickle.loads(pickle.dumps(format_for(read_checkpoint(tmp_path))))
    assert sorted(fmt.modules()) == sorted(truths)
    for module, truth in truths.items():
        layer = fmt.layer_of(module)
        assert isinstance(layer, LayerFormat)
        assert pickle.loads(pickle.dumps(layer)) == layer
        assert problems_of(fmt, module) == []
        assert (layer.n, layer.k) == truth.codes.shape
        assert layer.spec.group_size == truth.group_size
        assert layer.spec.has_zero_points == (truth.zeros is not None)
        assert layer.spec.scale_dtype.torch == torch.float16
        for layout in layer.tensors:
            info = fmt.checkpoint.tensors[f"{module}.{layout.name}"]
            assert layer.stored_shape(layout) == info.shape
            assert len(layout.dtypes) == 1
    for module in (HEAD, "model.embed_tokens", "model.layers.0.input_layernorm", "model.norm"):
        assert fmt.layer_of(module) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("build", BUILDS)
def test_scales_keep_their_dtype(build: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = load(tmp_path, build, dtype=dtype).layer_of(UP)
    assert layer is not None
    assert layer.spec.scale_dtype.torch == dtype


def test_layouts_are_data(tmp_path: Path) -> None:
    layer = load(tmp_path).layer_of(UP)
    assert layer is not None
    assert layer.description == "awq 4-bit g32, zero points"
    assert [(t.name, t.dims, t.dtype.torch) for t in layer.tensors] == [
        ("qweight", (Dim("k"), Dim("n", 8)), torch.int32),
        ("qzeros", (Dim("g"), Dim("n", 8)), torch.int32),
        ("scales", (Dim("g"), Dim("n")), torch.float16),
    ]


def test_g_idx_is_described_where_it_exists(tmp_path: Path) -> None:
    with_order = load(tmp_path / "v1", "gptq-sym").layer_of(UP)
    without = load(tmp_path / "v2", "gptq-sym-v2").layer_of(UP)
    assert with_order is not None
    assert without is not None
    assert with_order.tensor("g_idx") is not None
    assert without.tensor("g_idx") is None
    assert (with_order.packing.zero_offset, without.packing.zero_offset) == (1, 0)
    assert with_order.spec.weight_type == WeightType.UINT4B8


def test_bias_is_not_a_problem(tmp_path: Path) -> None:
    assert problems_of(load(tmp_path, edits=[add(f"{UP}.bias", torch.zeros(96))]), UP) == []


def test_every_quant_method_has_one_format() -> None:
    assert {name: fmt.name for name, fmt in FORMATS.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize(
    ("source", "config", "name"),
    [
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
        ("quantize_config.json", {"bits": 4, "group_size": 32}, "gptq"),
    ],
)
def test_configs_in_own_files_name_no_method(
    source: str, config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, f"{name}-sym" if name == "gptq" else name)
    whole = read_checkpoint(tmp_path)
    fmt = format_for(Checkpoint(whole.path, {}, config, source, whole.tensors))
    assert fmt.name == name
    assert fmt.layer_of(UP) is not None


EXCLUSIONS = {
    "awq": {"modules_to_not_convert": ["up_proj"]},
    "gptq-sym": {"dynamic": {r"-:.*\.up_proj": {}}},
    "gptq-asym": {"modules_in_block_to_quantize": [["mlp.gate_proj"], ["mlp.down_proj"], ["attn"]]},
    "autoround-sym": {"extra_config": {UP: {"bits": 16}}},
    "ct-sym": {"ignore": ["lm_head", UP]},
    "ct-asym": {"ignore": ["lm_head", "re:.*up_proj$"]},
}


@pytest.mark.parametrize("build", EXCLUSIONS)
def test_excluded_module(build: str, tmp_path: Path) -> None:
    config = EXCLUSIONS[build]
    fmt = load(tmp_path, build, config=config, edits=[make_plain(UP, 96, 64)])
    assert fmt.layer_of(UP) is None
    assert UP not in fmt.modules()
    assert fmt.layer_of(DOWN) is not None


@pytest.mark.parametrize("build", EXCLUSIONS)
def test_excluded_module_that_is_packed(build: str, tmp_path: Path) -> None:
    text = problem_of(load(tmp_path, build, config=EXCLUSIONS[build]), UP)
    assert text.startswith(f"{UP}: found packed tensors (")
    assert "although the config leaves this module unquantized" in text
    assert "; correct " in text


@pytest.mark.parametrize("build", ["awq", "gptq-sym", "autoround-sym", "ct-sym"])
def test_quantized_module_that_is_plain(build: str, tmp_path: Path) -> None:
    fmt = load(tmp_path, build, edits=[make_plain(UP, 96, 64)])
    assert UP in fmt.modules()
    text = problem_of(fmt, UP)
    assert "an unquantized weight F16 [96, 64] although the config says that this module" in text
    assert "exclude it by" in text


@pytest.mark.parametrize("build", ["awq", "gptq-sym", "autoround-sym", "ct-sym", "bnb-nf4"])
def test_a_norm_of_heads_is_no_linear_layer(build: str, tmp_path: Path) -> None:
    """Cohere's are `[heads, head_dim]`."""
    norm = "model.layers.0.self_attn.q_norm"
    fmt = load(tmp_path, build, edits=[add(f"{norm}.weight", torch.ones(4, 16).half())])
    assert fmt.layer_of(norm) is None


def test_quantized_module_that_is_absent(tmp_path: Path) -> None:
    assert "no packed tensors (found: none)" in problem_of(
        load(tmp_path, edits=[rename(UP, "gone")]), UP
    )


@pytest.mark.parametrize("build", ["awq", "gptq-sym", "autoround-sym"])
def test_modules_outside_the_quantized_blocks_stay_as_they_are(build: str, tmp_path: Path) -> None:
    names = ("visual.blocks.0.fc1.weight", "projector.weight")
    edits = [add(name, torch.zeros(8, 8)) for name in names]
    fmt = load(tmp_path, build, edits=edits)
    assert fmt.layer_of("visual.blocks.0.fc1") is None
    assert fmt.layer_of("projector") is None


MARKERS = {
    "awq": "qweight",
    "gptq-sym": "qweight",
    "autoround-sym": "qweight",
    "ct-sym": "weight_packed",
}


def test_a_quantized_lm_head_of_a_method_without_any(tmp_path: Path) -> None:
    words = torch.zeros(8, 8, dtype=torch.int32)
    fmt = load(tmp_path, "awq", edits=[drop(f"{HEAD}.weight"), add(f"{HEAD}.qweight", words)])
    assert HEAD in fmt.modules()
    text = problem_of(fmt, HEAD)
    assert "lm_head: found a quantized embedding or lm_head (qweight)" in text
    assert "quantize again without lm_head" in text


@pytest.mark.parametrize("build", MARKERS)
def test_an_expert_is_a_layer_of_its_own(build: str, tmp_path: Path) -> None:
    expert = "model.layers.0.mlp.experts.3.up_proj"
    fmt = load(tmp_path, build, edits=[rename(UP, expert)])
    layer = fmt.layer_of(expert)
    assert layer is not None
    assert layer.module == expert
    assert fmt.expert_modules == [expert]


def test_shared_experts_are_dense(tmp_path: Path) -> None:
    shared = "model.layers.0.mlp.shared_experts.up_proj"
    assert load(tmp_path, edits=[rename(UP, shared)]).layer_of(shared) is not None


def other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int16 if tensor.dtype in (torch.int32, torch.int64) else torch.float64)


STORED = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq-asym": ("qweight", "qzeros", "scales", "g_idx"),
    "ct-asym": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
}
CASES = [(build, name) for build, names in STORED.items() for name in names]


@pytest.mark.parametrize(("build", "name"), [case for case in CASES if case[1] != "g_idx"])
def test_missing_tensor(build: str, name: str, tmp_path: Path) -> None:
    text = problem_of(load(tmp_path, build, edits=[drop(f"{UP}.{name}")]), UP)
    assert text.startswith(f"{UP}: found no tensor {name} (only ")
    assert "; supported: modules with all of " in text
    assert "download the checkpoint again" in text


def test_a_module_of_which_only_scales_are_left(tmp_path: Path) -> None:
    gone = [drop(f"{UP}.{name}") for name in ("qweight", "qzeros", "g_idx")]
    fmt = load(tmp_path, "gptq-sym", edits=gone)
    assert UP in fmt.modules()
    assert f"{UP}: found no packed tensors (found: scales) although" in problem_of(fmt, UP)


@pytest.mark.parametrize(("build", "name"), CASES)
def test_wrong_dtype(build: str, name: str, tmp_path: Path) -> None:
    text = problem_of(load(tmp_path, build, edits=[replace(f"{UP}.{name}", other_dtype)]), UP)
    assert f"{name} stored as {'F64' if 'scale' in name else 'I16'}; supported: " in text


@pytest.mark.parametrize(("build", "name"), [case for case in CASES if case[1][-2:] != "ed"])
def test_wrong_shape(build: str, name: str, tmp_path: Path) -> None:
    fmt = load(
        tmp_path, build, edits=[replace(f"{UP}.{name}", lambda tensor: tensor[: len(tensor) // 2])]
    )
    texts = [str(problem) for problem in problems_of(fmt, UP)]
    assert texts
    # The packed weight is what the sizes come from, so there the others are reported
    if name != "qweight":
        (text,) = texts
        assert f"{name} of shape [" in text
        assert "for 96 out_features x 64 in_features, group_size 32; download" in text


@pytest.mark.parametrize("shape", [(96,), (0, 8), (2, 96, 8)])
def test_packed_weight_that_is_no_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    edit = add(f"{UP}.weight_packed", torch.zeros(shape, dtype=torch.int32))
    text = problem_of(load(tmp_path, "ct-sym", edits=[edit]), UP)
    assert f"weight_packed of shape {list(shape)}; supported: 2 dimensions, none of them" in text


@pytest.mark.parametrize(
    ("build", "name"), [("awq", "g_idx"), ("ct-sym", "weight_zero_point"), ("gptq-sym", "weight")]
)
def test_tensor_without_a_meaning(build: str, name: str, tmp_path: Path) -> None:
    edit = add(f"{UP}.{name}", torch.zeros(64, dtype=torch.int32))
    text = problem_of(load(tmp_path, build, edits=[edit]), UP)
    assert f"tensors with no known meaning here: {name}; supported: " in text


def test_reordered_compressed_tensors(tmp_path: Path) -> None:
    edit = add(f"{UP}.weight_g_idx", torch.zeros(64, dtype=torch.int32))
    assert "weight_g_idx (activation reordering) although the config says" in problem_of(
        load(tmp_path, "ct-sym", edits=[edit]), UP
    )


def test_all_problems_of_a_module_at_once(tmp_path: Path) -> None:
    edits = [drop(f"{UP}.qzeros"), replace(f"{UP}.scales", lambda t: t[:1].double())]
    problems = problems_of(load(tmp_path, edits=edits), UP)
    assert [problem.found for problem in problems] == [
        "no tensor qzeros (only qweight, scales)",
        "scales stored as F64",
        "scales of shape [1, 96]",
    ]
