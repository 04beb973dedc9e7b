"""compressed-tensors: both packings of odd widths, int-quantized weights, and what is refused."""

from typing import Any

import pytest
import torch

from builders.compressed_tensors import PADDING, STREAMING
from checkpoints import (
    ALL_BUILDS,
    Tensors,
    add,
    put,
    random_truth,
    write_checkpoint,
)
from layers import MODULE, check, cut, describe, problems_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import FusedQError, PreflightError, UnsupportedCheckpoint, WeightLoadError
from vllm_fusedq.formats import LayerFormat, format_for

ODD = (3, 5, 6, 7)
LAYER = "model.layers.0.mlp"


def described(build: str, k: int = 64, group_size: int = 32, **options: Any) -> str:
    return describe(build, ALL_BUILDS[build].truth(32, k, group_size), group_size, **options)[
        0
    ].description


def test_descriptions_name_the_packing_and_the_resident_width() -> None:
    assert described("ct-int8-sym", group_size=-1) == (
        "compressed-tensors int-quantized 8-bit per channel, symmetric"
    )
    assert described("ct-int4-asym") == ("compressed-tensors int-quantized 4-bit g32, zero points")
    assert described("ct-5bit-sym") == (
        "compressed-tensors 5-bit g32, symmetric, resident as 8-bit"
    )
    assert described("ct-3bit-padded-asym") == (
        "compressed-tensors pack-quantized, padded 3-bit g32, zero points, resident as 4-bit"
    )


@pytest.mark.parametrize("k", [16, 48, 80, 112, 144, 4096, 4112])
@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize("kind", ["", "-padded"])
def test_in_features_follow_from_the_words(bits: int, kind: str, k: int) -> None:
    build = f"ct-{bits}bit{kind}-asym"
    truth = ALL_BUILDS[build].truth(8, k, -1)
    layer, tensors = describe(build, truth, -1)
    assert (layer.n, layer.k) == (8, k)
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize(("stored", "said"), [("", PADDING), ("-padded", STREAMING)])
def test_a_version_that_is_not_true_is_refused(
    bits: int, stored: str, said: str, group_size: int
) -> None:
    build = f"ct-{bits}bit{stored}-sym"
    truth = ALL_BUILDS[build].truth(32, 256, group_size)

    def read() -> None:
        layer, tensors = describe(build, truth, group_size, version=said)
        layer.packing.logical(tensors, layer, layer.whole)

    with pytest.raises(FusedQError, match=r"weight_(packed|shape|scale)") as error:
        read()
    if isinstance(error.value, WeightLoadError):
        assert "found [32, 256], expected [32, " in str(error.value)
        assert "correct version in the config if another one" in str(error.value)


@pytest.mark.parametrize("version", [None, 0.18, "latest"])
def test_odd_widths_need_a_version(version: object) -> None:
    message = (
        rf"3-bit weights in group_0 and version {version!r} of compressed-tensors; supported by "
        "compressed-tensors: a version in the config, because .* 0.18; add the version"
    )
    with pytest.raises(UnsupportedCheckpoint, match=message):
        described("ct-3bit-sym", version=version)
    for build in ("ct-2bit-sym", "ct-sym", "ct-8bit-sym", "ct-int8-sym"):
        described(build, version=version)


@pytest.mark.parametrize("version", ["0.18.0", "0.18.1.a20260801", "1.0", "0.100"])
def test_versions_that_straddle_words(version: str) -> None:
    truth = ALL_BUILDS["ct-3bit-sym"].truth(32, 64, 32)
    layer, tensors = describe("ct-3bit-sym", truth, 32, version=version)
    check(layer, tensors, layer.whole, truth)


def int_quantized(bits: int, symmetric: bool) -> tuple[LayerFormat, Tensors]:
    build = f"ct-int{bits}-{'sym' if symmetric else 'asym'}"
    layer, tensors = describe(build, ALL_BUILDS[build].truth(16, 64, 32), 32)
    return layer, cut(layer, tensors, layer.whole)


def test_every_signed_integer() -> None:
    layer, tensors = int_quantized(8, True)
    values = torch.arange(-128, 128).to(torch.int8).repeat(4).view(16, 64)
    tensors["weight"] = values
    codes = layer.packing.logical(tensors, layer, layer.whole).codes
    assert torch.equal(codes.short() - 128, values.short())


@pytest.mark.parametrize("name", ["weight", "weight_zero_point"])
@pytest.mark.parametrize("value", [-9, 8])
def test_refuses_integers_of_more_bits(name: str, value: int) -> None:
    layer, tensors = int_quantized(4, False)
    put(name, (3, 1), value)(tensors)
    message = rf"{MODULE}.{name}: found {value}, expected -8 to 7 \(4 bits\); correct num_bits in"
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


def test_refuses_int_quantized_weights_of_another_dtype() -> None:
    build = ALL_BUILDS["ct-int8-sym"]
    truth = build.truth(16, 64, 32)
    tensors = {**build.tensors(truth), "weight": torch.zeros(16, 64, dtype=torch.float16)}
    with pytest.raises(PreflightError, match="weight stored as F16; supported: I8"):
        describe("ct-int8-sym", truth, 32, tensors)


def test_a_word_that_holds_no_row_is_refused() -> None:
    truth = ALL_BUILDS["ct-5bit-sym"].truth(16, 64, 32)
    tensors = ALL_BUILDS["ct-5bit-sym"].tensors(truth)
    tensors["weight_packed"] = tensors["weight_packed"][:, :1].contiguous()
    with pytest.raises(PreflightError, match=r"weight_packed of shape \[16, 1\]; .*none of them"):
        describe("ct-5bit-sym", truth, 32, tensors)


@pytest.mark.parametrize(("group_size", "runs"), [(32, True), (16, False)])
def test_parts_of_a_fused_layer_in_other_packings(
    tmp_path: Any, group_size: int, runs: bool
) -> None:
    """int-quantized and pack-quantized parts are one layer where they are resident alike."""
    from loading import assert_exact, load, plans_of

    other = ALL_BUILDS["ct-int8-sym"]
    truth = random_truth(96, 64, group_size, zero_range=None, bits=8, seed=9)
    edits = [add(f"{LAYER}.up_proj.{name}", t) for name, t in other.tensors(truth).items()]
    up = other.config(group_size)["config_groups"]["group_0"]
    groups = {
        "up": {**up, "targets": ["re:.*up_proj"], "format": "int-quantized"},
        "rest": ALL_BUILDS["ct-8bit-sym"].config(32)["config_groups"]["group_0"],
    }

    def replace_up(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{LAYER}.up_proj.")]:
            del tensors[name]

    truths = write_checkpoint(
        tmp_path, "ct-8bit-sym", config={"config_groups": groups}, edits=[replace_up, *edits]
    )
    truths[f"{LAYER}.up_proj"] = truth
    checkpoint = read_checkpoint(tmp_path)
    fmt = format_for(checkpoint)
    assert not [problem for module in fmt.modules() for problem in problems_of(fmt, module)]
    if not runs:
        with pytest.raises(PreflightError, match=r"different schemes .* int-quantized 8-bit g16"):
            plans_of(checkpoint, "cpu")
        return
    plan = next(plan for plan in plans_of(checkpoint, "cpu") if "gate_up" in plan.prefix)
    assert_exact(load(plan, tmp_path), truths)
