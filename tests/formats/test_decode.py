"""Stored tensors to logical weights, bit for bit, for any region; and every refusal of values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from builders.compressed_tensors import signed
from checkpoints import (
    ALL_BUILDS,
    BUILDS,
    WIDTH_BUILDS,
    Truth,
    put,
    replace,
    write_checkpoint,
)
from layers import MODULE, check, cut, describe
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats import Region, format_for
from vllm_fusedq.formats.shared.unpacking import unpack_columns, unpack_rows


@pytest.mark.parametrize("build", [*BUILDS, *WIDTH_BUILDS])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region(build: str, data: st.DataObject) -> None:
    unit = max(ALL_BUILDS[build].unit, 16 if build in WIDTH_BUILDS else 8)
    n, k = unit * data.draw(st.integers(1, 6), "n"), unit * data.draw(st.integers(1, 12), "k")
    group_size = data.draw(st.sampled_from([-1, 8, 16, 24, 32, 128]), "group_size")
    truth = ALL_BUILDS[build].truth(n, k, group_size, seed=data.draw(st.integers(0, 9), "seed"))
    layer, tensors = describe(build, truth, group_size)
    n0, k0 = data.draw(st.integers(0, n - 1), "n0"), data.draw(st.integers(0, k - 1), "k0")
    n1, k1 = data.draw(st.integers(n0 + 1, n), "n1"), data.draw(st.integers(k0 + 1, k), "k1")
    check(layer, tensors, Region(n0, n1, k0, k1), truth)


@pytest.mark.parametrize("build", [*BUILDS, *WIDTH_BUILDS])
def test_the_whole_layer_from_a_file(build: str, tmp_path: Path) -> None:
    truths = write_checkpoint(tmp_path, build)
    fmt = format_for(read_checkpoint(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    for module, truth in truths.items():
        layer = fmt.layer_of(module)
        assert layer is not None
        tensors = {t.name: stored[f"{module}.{t.name}"] for t in layer.tensors}
        check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("build", BUILDS)
def test_every_code_at_every_nibble(build: str, code: int) -> None:
    truth = BUILDS[build].truth(8, 16, 8)
    for index in range(8):
        codes = np.zeros((8, 16), dtype=np.uint8)
        codes[index, 8 + index] = code
        zeros = truth.zeros
        if zeros is not None:
            low, high = BUILDS[build].zero_range or (0, 15)
            zeros = np.full((8, 2), low, dtype=np.uint8)
            zeros[index, 1] = min(max(code, low), high)
        one = Truth(codes, zeros, truth.scales, 8)
        layer, tensors = describe(build, one, 8)
        check(layer, tensors, layer.whole, one)


@pytest.mark.parametrize("nibble", range(8))
def test_nibbles_by_hand(nibble: int) -> None:
    word = torch.tensor([[15 << 4 * nibble]], dtype=torch.int64).to(torch.int32)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    assert unpack_columns(word)[0].nonzero().tolist() == [[nibble]]
    assert unpack_rows(word)[:, 0].nonzero().tolist() == [[nibble]]
    assert unpack_rows(word, order=order)[:, 0].nonzero().tolist() == [[order[nibble]]]


def test_awq_word_by_hand() -> None:
    # Columns 0 to 7 hold 0 to 7, so the word's nibbles spell AutoAWQ's order, lowest first
    truth = Truth(
        np.arange(8, dtype=np.uint8)[:, None].repeat(8, 1),
        np.zeros((8, 1), dtype=np.uint8),
        torch.ones(8, 1, dtype=torch.float16),
        8,
    )
    layer, tensors = describe("awq", truth, 8)
    assert tensors["qweight"][0, 0].item() == 0x75316420
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "single"])
def test_unpacking_takes_any_strides(layout: str) -> None:
    base = torch.randint(-(2**31), 2**31 - 1, (6, 10), dtype=torch.int32)
    words = {
        "plain": base,
        "transposed": base.T,
        "strided": base[1::2, 2:7],
        "single": base[3:4, 4:5],
    }[layout]
    expected = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1).to(torch.uint8)
    rows, columns = words.shape
    assert torch.equal(unpack_columns(words), expected.reshape(rows, 8 * columns))
    assert torch.equal(unpack_rows(words), expected.transpose(1, 2).reshape(8 * rows, columns))


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_stream_of_bits_down_a_column(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (70, 5))
    stream = [sum(int(code) << bits * i for i, code in enumerate(column)) for column in codes.T]
    length = -(-70 * bits // 32)
    words = [[word >> 32 * i & 0xFFFFFFFF for word in stream] for i in range(length)]
    found = unpack_rows(torch.tensor(words).to(torch.int32), bits)
    assert torch.equal(found[:70].long(), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_agrees_with_the_compressed_tensors_package(bits: int, symmetric: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    kind = "sym" if symmetric else "asym"
    # The package that comes with vLLM here packs as all did before version 0.18
    build = f"ct-{kind}" if bits == 4 else f"ct-{bits}bit{'-padded' * (32 % bits > 0)}-{kind}"
    truth = ALL_BUILDS[build].truth(40, 112, 32)
    values = signed(truth.codes, truth)
    layer, tensors = describe(build, truth, 32)
    assert torch.equal(pack_to_int32(values, bits), tensors["weight_packed"])
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, (40, 112)), values)
    tensors["weight_packed"] = pack_to_int32(values, bits)
    if truth.zeros is not None:
        points = signed(truth.zeros, truth)
        tensors["weight_zero_point"] = pack_to_int32(points, bits, packed_dim=0).contiguous()
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_compressed_tensors_pads_zero_points_to_whole_words(n: int) -> None:
    truth = BUILDS["ct-asym"].truth(n, 64, 32)
    layer, tensors = describe("ct-asym", truth, 32)
    assert (layer.n, layer.k) == (n, 64)
    check(layer, tensors, layer.whole, truth)


def test_stored_slices_round_out_to_words_and_groups() -> None:
    truth = BUILDS["awq"].truth(32, 96, 32)
    layer, tensors = describe("awq", truth, 32)
    region = Region(5, 18, 31, 65)
    parts = {name: tuple(tensor.shape) for name, tensor in cut(layer, tensors, region).items()}
    assert parts == {"qweight": (34, 3), "qzeros": (3, 3), "scales": (3, 13)}
    assert parts == {t.name: layer.stored_shape(t, region) for t in layer.tensors}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype"])
def test_refuses_tensors_that_do_not_fit(build: str, damage: str) -> None:
    truth = BUILDS[build].truth(16, 64, 32)
    layer, tensors = describe(build, truth, 32)
    name = layer.tensors[0].name
    if damage == "missing":
        del tensors[name]
        message = f"{MODULE}: tensor {name} was not loaded"
    elif damage == "shape":
        tensors[name] = tensors[name][:-1]
        message = rf"{MODULE}.{name}: found torch.int32 \[.*\], expected torch.int32 \["
    else:
        tensors[name] = tensors[name].to(torch.int64)
        message = rf"{MODULE}.{name}: found torch.int64 \[.*\], expected torch.int32 \["
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("build", "name"), [("awq", "scales"), ("ct-sym", "weight_scale")])
def test_refuses_scales_that_are_not_finite(build: str, name: str, value: float) -> None:
    layer, tensors = describe(build, BUILDS[build].truth(16, 64, 32), 32)
    put(name, (1, 1), value)(tensors)
    message = f"{MODULE}.{name}: found 1 NaN or infinite values, expected finite"
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


@pytest.mark.parametrize("bounds", [(0, 0, 0, 8), (0, 17, 0, 64), (0, 16, 8, 8), (-1, 4, 0, 8)])
def test_regions_outside_the_layer_are_our_mistake(bounds: tuple[int, int, int, int]) -> None:
    layer, tensors = describe("awq", BUILDS["awq"].truth(16, 64, 32), 32)
    with pytest.raises(ValueError, match="does not lie inside") as caught:
        layer.packing.logical(tensors, layer, Region(*bounds))
    assert not isinstance(caught.value, WeightLoadError)


@pytest.mark.parametrize(("k", "group"), [(0, 1), (63, 0), (40, -1), (40, 9)])
def test_refuses_reordered_activations(k: int, group: int) -> None:
    layer, tensors = describe("gptq-sym", BUILDS["gptq-sym"].truth(16, 64, 32), 32)
    put("g_idx", (k,), group)(tensors)
    message = (
        rf"{MODULE}.g_idx: found in_feature {k} in group {group} \(1 of 64 in_features are out of "
        rf"order\), expected group {k // 32} of size 32 without activation reordering; set "
    )
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


def nibbles(value: int) -> int:
    return int(np.uint32(0x11111111 * value).view(np.int32))


@pytest.mark.parametrize("build", ["gptq-sym", "gptq-sym-v2"])
@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_zero_points_of_a_mislabelled_version(build: str, stored: int) -> None:
    truth = BUILDS[build].truth(16, 64, 32)
    layer, tensors = describe(build, truth, 32)
    tensors["qzeros"].fill_(nibbles(stored))
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize(
    ("build", "expected"), [("gptq-sym", 7), ("gptq-sym-v2", 8)], ids=["v1", "v2"]
)
@pytest.mark.parametrize("stored", [0, 6, 9, 15])
def test_refuses_symmetric_zero_points_other_than_8(build: str, expected: int, stored: int) -> None:
    layer, tensors = describe(build, BUILDS[build].truth(16, 64, 32), 32)
    tensors["qzeros"].fill_(nibbles(stored))
    message = f"{MODULE}.qzeros: found stored zero points {stored} although .* sym true, expected "
    with pytest.raises(WeightLoadError, match=f"{message}{expected} everywhere .zero point 8."):
        layer.packing.logical(tensors, layer, layer.whole)


def test_refuses_symmetric_zero_points_that_vary() -> None:
    layer, tensors = describe("gptq-sym", BUILDS["gptq-sym"].truth(16, 64, 32), 32)
    put("qzeros", (1, 1), nibbles(8))(tensors)
    with pytest.raises(WeightLoadError, match="found stored zero points 7 to 8 although"):
        layer.packing.logical(tensors, layer, layer.whole)


def test_refuses_a_zero_point_of_16() -> None:
    layer, tensors = describe("gptq-asym", BUILDS["gptq-asym"].truth(16, 64, 32), 32)
    put("qzeros", (0, 1), nibbles(15))(tensors)
    message = f"{MODULE}.qzeros: found stored zero points 15 side by side, .* are 16, or 0 after an"
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)


@pytest.mark.parametrize("shape", [[64, 16], [16, 62], [0, 0]])
def test_refuses_a_weight_shape_that_disagrees(shape: list[int]) -> None:
    layer, tensors = describe("ct-sym", BUILDS["ct-sym"].truth(16, 64, 32), 32)
    replace("weight_shape", lambda _: torch.tensor(shape))(tensors)
    message = rf"{MODULE}.weight_shape: found \[{shape[0]}, {shape[1]}\], expected \[16, 64\]"
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(tensors, layer, layer.whole)
