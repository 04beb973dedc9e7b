"""GPTQ's zero points: both conventions, what proves them, and every width by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from builders.gptq import gptq_words
from checkpoints import ALL_BUILDS, Tensors, Truth, put, random_truth, with_fields
from layers import MODULE, check, cut, describe
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats import (
    Finding,
    LayerFormat,
    Region,
    format_for,
    settle,
)

SAID = {"gptq": "gptq-asym", "gptq_v2": "gptq-asym-v2"}


def inspected(layer: LayerFormat, tensors: Tensors, region: Region | None = None) -> Finding | None:
    region = region or layer.whole
    return layer.packing.evidence(cut(layer, tensors, region), layer, region)


def test_three_bit_words_by_hand() -> None:
    # Every in_feature holds its number modulo 8: 11 codes begin in each of the first two words
    codes = (np.arange(32) % 8).astype(np.uint8)[None].repeat(32, 0)
    truth = with_fields(random_truth(32, 32, 32, zero_range=None, bits=3), codes=codes)
    layer, tensors = describe("gptq-3bit-sym", truth, 32)
    stream = sum(int(code) << 3 * index for index, code in enumerate(codes[0]))
    words = [stream >> 32 * index & 0xFFFFFFFF for index in range(3)]
    assert (tensors["qweight"][:, 0].numpy().view(np.uint32) == words).all()
    assert layer.description == "gptq 3-bit per channel, symmetric, resident as 4-bit"
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero_that_v1_cannot_store(bits: int) -> None:
    """GPTQModel subtracts one from whole words, so that a 0 borrows from its neighbour."""
    build = "gptq-asym" if bits == 4 else f"gptq-{bits}bit-asym"
    truth = ALL_BUILDS[build].truth(64, 64, 32)
    truth.zeros[::5] = 0
    # The highest field of a word has no neighbour to borrow from
    truth.zeros[32 // bits - 2 :: 32 // bits] = 3
    layer, tensors = describe(build, truth, 32)
    words = gptq_words(np.ascontiguousarray(truth.zeros.T), bits)
    if bits == 3:
        words = gptq_words(np.ascontiguousarray(truth.zeros.T - 1) & 7, bits)
    else:
        ones = sum(1 << bits * field for field in range(32 // bits))
        words = torch.from_numpy((words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    tensors["qzeros"] = words
    check(layer, tensors, layer.whole, truth)
    check(layer, tensors, Region(5, 37, 32, 64), truth)


@pytest.mark.parametrize("bits", [4, 8])
def test_refuses_zero_points_destroyed_by_an_underflow(bits: int) -> None:
    """AutoGPTQ fills every field above a 0 that it stores minus one."""
    build = "gptq-asym" if bits == 4 else "gptq-8bit-asym"
    layer, tensors = describe(build, ALL_BUILDS[build].truth(16, 64, 32), 32)
    tensors["qzeros"][1, 0] |= -1 << bits
    full = 2**bits - 1
    message = (
        f"{MODULE}.qzeros: found stored zero points {full} side by side, which in "
        f"checkpoint_format gptq are {full + 1}, or 0 after .* fit {bits} bits; set checkpoint_fo"
    )
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_prove_their_convention(bits: int, said: str, stored: str) -> None:
    build = "gptq-sym" if bits == 4 else f"gptq-{bits}bit-sym"
    truth = ALL_BUILDS[build].truth(64, 64, 32)
    zero = 2 ** (bits - 1) - (stored == "gptq")
    layer, tensors = describe(build, truth, 32, checkpoint_format=said)
    tensors["qzeros"] = gptq_words(np.full((2, 64), zero, np.uint8), bits)
    check(layer, tensors, layer.whole, truth)
    why = f"sym is true and every stored zero point {zero}"
    assert inspected(layer, tensors) == Finding(said, stored, why)


def like_weights(bits: int, ordered: bool = False) -> Truth:
    """Codes of weights around zero under zero points of many values, as quantizers make them."""
    rng = np.random.default_rng(0)
    n, k, group_size = 128, 1024, 32
    top = 2**bits - 1
    weights = rng.normal(0.02, 1, (n, k // group_size, group_size))
    low, high = weights.min(-1, keepdims=True), weights.max(-1, keepdims=True)
    scales = (high - low) / top
    zeros = np.clip(np.rint(-low / scales), 1, top)
    codes = np.clip(np.rint(weights / scales) + zeros, 0, top).astype(np.uint8).reshape(n, k)
    groups = np.arange(k) // group_size
    if ordered:
        order = rng.permutation(k)
        codes, groups = codes[:, order], groups[order]
    scales = torch.from_numpy(scales[..., 0]).half()
    zeros = zeros[..., 0].astype(np.uint8)
    return Truth(codes, zeros, scales, group_size, groups if ordered else None, bits)


@pytest.mark.parametrize("bounds", [(0, 1024), (512, 1024), (16, 528)])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("said", SAID)
def test_codes_confirm_the_convention(
    said: str, bits: int, ordered: bool, bounds: tuple[int, int]
) -> None:
    truth = like_weights(bits, ordered)
    made = ALL_BUILDS[SAID[said]].tensors(truth)
    layer, _ = describe(SAID[said], truth, 32, made, bits=bits, desc_act=ordered)
    finding = inspected(layer, made, Region(0, 128, *bounds))
    assert (finding.said, finding.found) == (said, said)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("said", "stored"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_codes_that_contradict_the_convention_are_refused(
    said: str, stored: str, bits: int, ordered: bool
) -> None:
    truth = like_weights(bits, ordered)
    made = ALL_BUILDS[SAID[stored]].tensors(truth)
    layer, _ = describe(SAID[said], truth, 32, made, bits=bits, desc_act=ordered)
    message = (
        f"{MODULE}.qzeros: found codes that average .* above the stored zero points, where weights "
        f"around zero average {int(said == 'gptq')} in checkpoint_format {said} and "
        f"{int(stored == 'gptq')} in {stored}; set checkpoint_format to {stored} in the config"
    )
    with pytest.raises(WeightLoadError, match=message):
        inspected(layer, made)


@pytest.mark.parametrize("case", ["few", "wide"])
def test_too_little_evidence_is_none(case: str) -> None:
    truth = like_weights(8 if case == "wide" else 4)
    if case == "few":
        truth = with_fields(truth, codes=truth.codes[:8], zeros=truth.zeros[:8])
        truth = with_fields(truth, scales=truth.scales[:8])
    made = ALL_BUILDS["gptq-asym"].tensors(truth)
    layer, _ = describe("gptq-asym", truth, 32, made, bits=truth.bits)
    assert inspected(layer, made) == Finding("gptq", None, "")


def test_codes_far_from_both_conventions_prove_nothing() -> None:
    truth = like_weights(4)
    truth = with_fields(truth, codes=np.minimum(truth.codes + 3, 15).astype(np.uint8))
    made = ALL_BUILDS["gptq-asym"].tensors(truth)
    layer, _ = describe("gptq-asym", truth, 32, made)
    finding = inspected(layer, made)
    assert finding.found is None
    assert finding.why.startswith("codes average ")


@pytest.mark.parametrize("build", ["awq", "ct-asym", "ct-int8-sym"])
def test_formats_with_one_convention_find_nothing(build: str) -> None:
    layer, tensors = describe(build, ALL_BUILDS[build].truth(16, 64, 32), 32)
    assert inspected(layer, tensors) is None


V1 = Finding("gptq", "gptq", "every zero 7")
V2 = Finding("gptq", "gptq_v2", "every zero 8")
UNSURE = Finding("gptq", None, "")


@pytest.mark.parametrize("findings", [[], [V1, V1], [V1, UNSURE], [UNSURE]])
def test_layers_as_the_config_says_need_no_word(findings: list[Finding]) -> None:
    assert settle(dict(zip("abc", findings, strict=False))) == ""


def test_a_mislabelled_checkpoint_is_told() -> None:
    assert settle({"a": V2, "b": V2}) == (
        "The config says gptq, the values say gptq_v2 (every zero 8): 2 layers are read as gptq_v2."
    )


@pytest.mark.parametrize("other", [V1, UNSURE, replace(UNSURE, why="codes average 0.50")])
def test_layers_that_contradict_each_other_are_refused(other: Finding) -> None:
    with pytest.raises(WeightLoadError) as error:
        settle({"a": V2, "b": other, "c": V2})
    text = str(error.value)
    assert "found layers that were stored in different ways: gptq_v2 in 2 layers (a: " in text
    assert f"{other.found or 'nothing proven'} in 1 layers (b: " in text
    assert "set it to gptq" in text


@pytest.mark.parametrize("group", [-1, 32])
def test_refuses_groups_that_do_not_exist_before_it_judges_them(group: int) -> None:
    truth = like_weights(4, ordered=True)
    made = ALL_BUILDS["gptq-asym"].tensors(truth)
    put("g_idx", (7,), group)(made)
    layer, _ = describe("gptq-asym", truth, 32, made, desc_act=True)
    with pytest.raises(WeightLoadError, match=f"g_idx: found group {group}, expected 0 to 31"):
        inspected(layer, made)


def test_refuses_values_before_it_judges_them() -> None:
    layer, tensors = describe("gptq-asym", ALL_BUILDS["gptq-asym"].truth(16, 64, 32), 32)
    put("scales", (0, 0), float("nan"))(tensors)
    with pytest.raises(WeightLoadError, match="found 1 NaN or infinite values"):
        inspected(layer, tensors)


MIXED = tiny_models.MIXED[0]


def real_findings(checkpoint_format: str) -> dict[str, Finding]:
    checkpoint = read_checkpoint(tiny_models.asset(MIXED))
    config = {**checkpoint.quant_config, "checkpoint_format": checkpoint_format}
    fmt = format_for(replace(checkpoint, quant_config=config))
    stored = load_file(tiny_models.asset(MIXED) / "model.safetensors")
    findings = {}
    for module in fmt.modules():
        layer = fmt.layer_of(module)
        tensors = {t.name: stored[f"{module}.{t.name}"] for t in layer.tensors}
        findings[module] = inspected(layer, tensors)
    return findings


def test_gptqmodels_own_layers_prove_their_convention() -> None:
    findings = real_findings("gptq")
    assert {finding.said for finding in findings.values()} == {"gptq"}
    assert {finding.found for finding in findings.values()} == {"gptq"}
    assert settle(findings) == ""


def test_gptqmodels_own_layers_under_the_wrong_name_are_refused() -> None:
    with pytest.raises(WeightLoadError, match=r"mlp\.\w+\.qzeros: found codes that average 0.99"):
        real_findings("gptq_v2")
