"""bitsandbytes 4-bit: its own tensors bit for bit, any region, any split, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedq_kernels
from builders.bitsandbytes import BUILDS, PACKINGS, QUANT_MAPS, UNITS, packed_state
from checkpoints import (
    Tensors,
    Truth,
    add,
    drop,
    make_plain,
    put,
    rename,
    replace,
    write_checkpoint,
)
from fusedq_kernels.testing import assert_close
from fusedq_kernels.types import WeightType
from layers import MODULE, check, cut, describe, problems_of
from loading import load as load_layer
from loading import plans_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import (
    PreflightError,
    UnsupportedCheckpoint,
    WeightLoadError,
)
from vllm_fusedq.formats import CheckpointFormat, LayerFormat, Region, format_for

UP = MODULE
DOWN = "model.layers.0.mlp.down_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"


def made(
    build: str, n: int, k: int, blocksize: int, seed: int = 0
) -> tuple[LayerFormat, Tensors, Truth]:
    truth = BUILDS[build].truth(n, k, blocksize, seed=seed)
    return *describe(build, truth, blocksize), truth


def whole(layer: LayerFormat, tensors: Tensors) -> Tensors:
    return cut(layer, tensors, layer.whole)


PACKED = {
    "nf4-nested": ("nf4", 64),
    "nf4-nested-256": ("nf4", 256),
    "fp4-nested-128": ("fp4", 128),
    "nf4-bf16": ("nf4", 64),
    "fp4": ("fp4", 64),
}


@pytest.mark.parametrize("case", PACKED)
def test_bitsandbytes_own_packing(case: str) -> None:
    """The codes, the absmax and the values that bitsandbytes makes of its own tensors."""
    quant_type, blocksize = PACKED[case]
    stored = {
        name.removeprefix(f"{case}."): tensor
        for name, tensor in PACKINGS.items()
        if name.startswith(f"{case}.")
    }
    values = stored.pop("values")
    layer, tensors = describe(f"bnb-{quant_type}", None, blocksize, stored)
    assert (layer.n, layer.k, layer.spec.group_size) == (*values.shape, 64)
    weight = layer.packing.logical(whole(layer, tensors), layer, layer.whole)
    # The largest weight of a block is worth its absmax
    blocks = values.reshape(-1, blocksize).abs().amax(dim=1)
    absmax = blocks.repeat_interleave(blocksize).view_as(values)
    assert torch.equal(weight.scales, absmax[:, ::64] / UNITS[quant_type])
    assert torch.equal(QUANT_MAPS[quant_type][weight.codes.int()] * absmax, values)
    assert weight.spec.scale_dtype.torch == torch.float32


def test_another_default_device_changes_nothing() -> None:
    """vLLM's weight transfer makes the GPU the default; what would be allocated there is lost."""
    layer, tensors, truth = made("bnb-nf4-nested", 8, 192, 64)
    with torch.device("meta"):
        weight = layer.packing.logical(whole(layer, tensors), layer, layer.whole)
    assert torch.equal(weight.codes, torch.from_numpy(truth.codes))


@pytest.mark.parametrize("build", BUILDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region(build: str, data: st.DataObject) -> None:
    """Blocks that begin inside rows too."""
    n, k = data.draw(st.integers(1, 20), "n"), 2 * data.draw(st.integers(1, 100), "k/2")
    blocksize = data.draw(st.sampled_from([32, 64, 256, 4096]), "blocksize")
    layer, tensors, truth = made(build, n, k, blocksize, data.draw(st.integers(0, 9), "seed"))
    n0, k0 = data.draw(st.integers(0, n - 1), "n0"), data.draw(st.integers(0, k - 1), "k0")
    n1, k1 = data.draw(st.integers(n0 + 1, n), "n1"), data.draw(st.integers(k0 + 1, k), "k1")
    check(layer, tensors, Region(n0, n1, k0, k1), truth)


@pytest.mark.parametrize("kernel", ["triton-gemm", "cpu-striped"])
@pytest.mark.parametrize("build", ["bnb-nf4-nested", "bnb-fp4"])
def test_ranks_that_begin_inside_blocks_add_up(tmp_path: Path, build: str, kernel: str) -> None:
    """288 in_features over two ranks, in blocks of 64: the second begins 16 into a block."""
    truths = write_checkpoint(tmp_path, build, hidden=64, intermediate=288, group_size=64)
    x = torch.randn((3, 288), generator=torch.Generator().manual_seed(0)).half()
    found = torch.zeros((3, 64), dtype=torch.float64)
    for rank in range(2):
        plans = plans_of(read_checkpoint(tmp_path), "gpu", 2, rank)
        plan = next(plan for plan in plans if "down_proj" in plan.prefix)
        assert (plan.spec.group_size, plan.phase) == (32, 16 * rank)
        own = x[:, rank * 144 : rank * 144 + 144]
        found += fusedq_kernels.matmul(own, load_layer(plan, tmp_path).packed, None, kernel)
    expected = x.double() @ truths[DOWN].values(0, 64, 0, 288).t()
    # The kernels round the codebook to fp16, as they would a weight
    assert_close(found, expected, max_error=12 * 2**-11, rms_error=1.5 * 2**-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_storage_of_the_same_bytes(dtype: torch.dtype) -> None:
    truth = BUILDS["bnb-nf4"].truth(8, 192, 64)
    stored = BUILDS["bnb-nf4"].tensors(truth)
    stored["weight"] = stored["weight"].view(-1).view(dtype)
    layer, tensors = describe("bnb-nf4", None, 64, stored)
    check(layer, tensors, Region(3, 8, 62, 130), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_absmax_in_16_bits(dtype: torch.dtype) -> None:
    stored = BUILDS["bnb-nf4"].tensors(BUILDS["bnb-nf4"].truth(8, 128, 64))
    stored["weight.absmax"] = stored["weight.absmax"].to(dtype)
    layer, tensors = describe("bnb-nf4", None, 64, stored)
    weight = layer.packing.logical(whole(layer, tensors), layer, layer.whole)
    assert layer.spec.scale_dtype.torch == torch.float32
    assert torch.equal(weight.scales, stored["weight.absmax"].float().view(8, 2))


def test_the_type_is_the_tensors_not_the_configs() -> None:
    stored = BUILDS["bnb-fp4"].tensors(BUILDS["bnb-fp4"].truth(8, 128, 64))
    layer, _ = describe("bnb-nf4", None, 64, stored)
    assert layer.spec.weight_type is WeightType.FP4
    assert layer.description == "bitsandbytes fp4 4-bit g64"


def load(path: Path, *edits: Any, build: str = "bnb-nf4-nested", **config: Any) -> CheckpointFormat:
    write_checkpoint(path, build, edits=edits, config=config)
    return format_for(read_checkpoint(path))


def problem_of(fmt: CheckpointFormat, module: str) -> str:
    (problem,) = problems_of(fmt, module)
    return str(problem)


REFUSED_CONFIGS = {
    "int8": (
        {"load_in_4bit": False, "load_in_8bit": True},
        r"load_in_8bit \(LLM.int8\(\) multiplies by quantized activations\); supported by "
        "bitsandbytes: load_in_4bit, .*; quantize the original model again with load_in_4bit",
    ),
    "nothing": ({"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit; supported"),
    "no flag": ({"load_in_4bit": "yes"}, "load_in_4bit 'yes'; supported .* true or false"),
    "names": ({"llm_int8_skip_modules": "lm_head"}, "as a list of names"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refuses_configs(tmp_path: Path, case: str) -> None:
    config, message = REFUSED_CONFIGS[case]
    with pytest.raises(UnsupportedCheckpoint, match=message):
        load(tmp_path, **config)


def test_refuses_to_quantize_by_itself(tmp_path: Path) -> None:
    def dequantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".weight." in name]:
            del tensors[name]

    message = "no module with packed tensors .* already quantized; quantize the model first, or"
    with pytest.raises(UnsupportedCheckpoint, match=message):
        load(tmp_path, dequantize)


def edited_state(**changes: object) -> Any:
    """An edit of the JSON of up_proj; None removes an entry."""

    def edit(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[f"{UP}.{STATE}"].tolist())) | changes
        state = {key: value for key, value in state.items() if value is not None}
        tensors[f"{UP}.{STATE}"] = packed_state(state)

    return edit


BLOCKSIZES = r"supported: one of \(32, 64, 128, 256, 512, 1024, 2048, 4096\)"
BAD_STATES = {
    "other type": (edited_state(quant_type="fp4"), f"quant_type 'fp4' in {STATE}; supported: nf4"),
    "no type": (edited_state(quant_type=None), "quant_type None in"),
    "blocksize": (edited_state(blocksize=48), f"blocksize 48 in {STATE}; {BLOCKSIZES}"),
    "blocksize true": (edited_state(blocksize=True), "blocksize True in"),
    "blocksize list": (edited_state(blocksize=[64]), r"blocksize \[64\] in"),
    "no blocksize": (edited_state(blocksize=None), "blocksize None in"),
    "flat shape": (edited_state(shape=[6144]), r"shape \[6144\] in .* \[N, K\] with an even K"),
    "empty shape": (edited_state(shape=[0, 64]), r"shape \[0, 64\] in"),
    "odd shape": (edited_state(shape=[64, 33]), r"shape \[64, 33\] in"),
    "huge shape": (edited_state(shape=[2**40, 64]), r"shape \[1099511627776, 64\] in"),
    "other shape": (
        edited_state(shape=[96, 128]),
        r"weight of shape \[3072, 1\]; supported: the 6144 elements of uint8 \[96, 64\] for 96 "
        "out_features x 128 in_features",
    ),
    "nested dtype": (
        edited_state(nested_dtype="bfloat16"),
        "nested_dtype 'bfloat16' in .* supported: float32",
    ),
    "nested blocksize": (edited_state(nested_blocksize=0), "nested_blocksize 0 in"),
    "nested offset": (edited_state(nested_offset=float("nan")), "nested_offset nan in"),
    "no nested offset": (edited_state(nested_offset=None), "nested_offset None in"),
    "not nested": (
        edited_state(nested_blocksize=None),
        f"found tensors of double quantization, of which {STATE} says otherwise; supported: "
        "tensors and .* that agree",
    ),
    "no nested tensors": (
        lambda t: [t.pop(f"{UP}.weight.nested_{x}") for x in ("absmax", "quant_map")],
        "found no tensors of double quantization, of which",
    ),
    "half nested": (drop(f"{UP}.weight.nested_absmax"), "found no tensor weight.nested_absmax"),
    "no JSON": (add(f"{UP}.{STATE}", torch.ones(5).byte()), r"b'\\x01.* supported: a JSON object"),
    "deep JSON": (
        add(f"{UP}.{STATE}", torch.full((4096,), ord("["), dtype=torch.uint8)),
        "supported: a JSON object",
    ),
    "no object": (add(f"{UP}.{STATE}", packed_state([1])), r"found \[1\] in .* a JSON object"),
    "much state": (
        add(f"{UP}.{STATE}", torch.zeros(5000).byte()),
        "no readable weight.quant_state.bitsandbytes__nf4 or .* of at most 4096 bytes",
    ),
    "state dtype": (add(f"{UP}.{STATE}", torch.zeros(50)), "no readable weight.quant_state"),
    "no state": (drop(f"{UP}.{STATE}"), r"no readable .* \(only weight, weight.absmax, "),
    "two states": (
        add(f"{UP}.weight.quant_state.bitsandbytes__fp4", torch.zeros(5).byte()),
        "no known meaning here: weight.quant_state.bitsandbytes__fp4",
    ),
    "no absmax": (drop(f"{UP}.weight.absmax"), "found no tensor weight.absmax"),
    "no map": (drop(f"{UP}.weight.quant_map"), "found no tensor weight.quant_map"),
    "few absmax": (
        replace(f"{UP}.weight.absmax", lambda t: t[:-1]),
        r"weight.absmax of shape \[191\]; supported: the 192 elements of uint8 \[96, 2\] for 96 ",
    ),
    "absmax dtype": (
        replace(f"{UP}.weight.absmax", torch.Tensor.float),
        "weight.absmax stored as F32; supported: U8;",
    ),
    "weight dtype": (
        replace(f"{UP}.weight", lambda t: t.view(torch.int8)),
        "weight stored as I8; supported: F32 or F16 or BF16 or U8",
    ),
    "few nested": (
        replace(f"{UP}.weight.nested_absmax", lambda t: t[:-1]),
        r"weight.nested_absmax of shape \[5\]; supported: \[6\]",
    ),
    "few weights": (
        replace(f"{UP}.weight", lambda t: t[:-1]),
        r"weight of shape \[3071, 1\]; supported: the 3072 elements of uint8 \[96, 32\]",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_refuses_layers_from_headers_and_state(tmp_path: Path, case: str) -> None:
    edit, message = BAD_STATES[case]
    fmt = load(tmp_path, edit)
    assert UP in fmt.modules()
    with pytest.raises(PreflightError, match=message) as caught:
        fmt.layer_of(UP)
    assert all(problem.layer == UP for problem in caught.value.problems)
    assert problems_of(fmt, DOWN) == []


def test_refuses_a_shape_that_does_not_fit_its_neighbours(tmp_path: Path) -> None:
    """Its bytes would: up_proj is [96, 64]."""
    write_checkpoint(tmp_path, "bnb-nf4-nested", edits=[edited_state(shape=[64, 96])])
    message = (
        r"mlp.gate_up_proj: found parts with different in_features in one fused layer \(gate_proj "
        r"\[96, 64\], up_proj \[64, 96\]\); supported: parts"
    )
    with pytest.raises(PreflightError, match=message):
        plans_of(read_checkpoint(tmp_path), "cpu")


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    fmt = load(tmp_path, drop(f"{UP}.weight"))
    assert f"{UP}.weight" in fmt.modules()
    assert problem_of(fmt, f"{UP}.weight").startswith(f"{UP}.weight: found no readable weight.quan")
    assert "no packed tensors (found: none)" in problem_of(fmt, UP)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("weight.quant_map", (3,), 0.5), r"quant_map: found \[-1.0, .* 0.5, .* of nf4 in bits"),
        (put("weight.quant_map", (3,), torch.nan), "quant_map: found 1 NaN or infinite values"),
        (put("weight.nested_absmax", (0,), torch.inf), "absmax: found 32 NaN or infinite values"),
        (add(STATE, packed_state({})), "found torch.uint8 .*, expected torch.uint8"),
    ],
    ids=["codebook", "nan codebook", "infinite absmax", "state"],
)
def test_refuses_tensors_by_their_values(edit: Any, message: str) -> None:
    layer, tensors, _ = made("bnb-nf4-nested", 8, 512, 64)
    edit(tensors)
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(whole(layer, tensors), layer, layer.whole)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"[8, 512]", b"[512, 8]", r"found shape \[512, 8\], expected \[8, 512\] as before"),
        (b'"nf4"', b'"nf5"', "found quant_type 'nf5'; supported: nf4; download"),
    ],
)
def test_refuses_a_state_that_changes(old: bytes, new: bytes, message: str) -> None:
    layer, tensors, _ = made("bnb-nf4", 8, 512, 64)
    state = bytes(tensors[STATE].tolist()).replace(old, new)
    tensors[STATE] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(WeightLoadError, match=f"{MODULE}.{STATE}: {message}"):
        layer.packing.logical(whole(layer, tensors), layer, layer.whole)


SKIPS = ["up_proj", "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj", "model.layers.0.mlp"]


@pytest.mark.parametrize("name", SKIPS)
def test_skipped_modules_stay_as_they_are(tmp_path: Path, name: str) -> None:
    fmt = load(tmp_path, make_plain(UP, 96, 64), llm_int8_skip_modules=[name, "lm_head"])
    assert fmt.layer_of(UP) is None
    assert UP not in fmt.modules()
    assert fmt.layer_of(DOWN) is not None


def test_skipped_modules_that_are_packed_are_packed(tmp_path: Path) -> None:
    assert load(tmp_path, llm_int8_skip_modules=["up_proj"]).layer_of(UP) is not None


def test_refuses_a_plain_weight_that_nothing_skips(tmp_path: Path) -> None:
    fmt = load(tmp_path, make_plain(UP, 96, 64), llm_int8_skip_modules=["p_proj.up", "down"])
    assert "exclude it by llm_int8_skip_modules if it is meant to stay" in problem_of(fmt, UP)


def test_modules_outside_the_quantized_blocks_stay_as_they_are(tmp_path: Path) -> None:
    names = ("visual.blocks.0.fc1", "score")
    fmt = load(tmp_path, *(add(f"{name}.weight", torch.zeros(8, 8)) for name in names))
    assert [fmt.layer_of(name) for name in (*names, "lm_head")] == [None] * 3


def test_refuses_heads_and_reads_experts(tmp_path: Path) -> None:
    fmt = load(tmp_path / "head", rename(UP, "lm_head"), drop("lm_head.weight.quant_map"))
    assert "lm_head: found a quantized embedding or lm_head (weight.absmax," in problem_of(
        fmt, "lm_head"
    )
    expert = "model.layers.0.mlp.experts.3.up_proj"
    fmt = load(tmp_path / "experts", rename(UP, expert))
    layer = fmt.layer_of(expert)
    assert layer is not None
    assert layer.module == expert


def test_the_format_is_plain_data(tmp_path: Path) -> None:
    """Workers get the format without the file: what the file says was read before."""
    import pickle

    fmt = load(tmp_path)
    expected = fmt.layer_of(UP)
    (tmp_path / "model.safetensors").unlink()
    assert pickle.loads(pickle.dumps(fmt)).layer_of(UP) == expected
