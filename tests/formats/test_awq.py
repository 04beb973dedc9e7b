"""AWQ's packings and widths: their tools' own tensors, any region, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tiny_models
from checkpoints import ALL_BUILDS, AWQ_BUILDS, Truth, put, with_fields
from layers import MODULE, check, cut, describe
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats import Region

VERSIONS = {"awq": "gemm", "awq-gemv": "gemv", "awq-gemv-fast": "gemv_fast"}


@pytest.fixture(scope="module")
def packings() -> dict[str, torch.Tensor]:
    """One layer as AutoAWQ's modules pack it (tests/assets/scripts/pack_awq.py)."""
    return load_file(tiny_models.ASSETS / "awq-packings.safetensors")


@pytest.mark.parametrize("build", VERSIONS)
def test_autoawqs_own_packing(build: str, packings: dict[str, torch.Tensor]) -> None:
    truth = Truth(packings["codes"].numpy(), packings["zeros"].numpy(), packings["scales"], 64)
    layer, made = describe(build, truth, 64)
    names = ("qweight", "qzeros", "scales")
    theirs = {name: packings[f"{VERSIONS[build]}.{name}"] for name in names}
    assert all(torch.equal(made[name], theirs[name]) for name in names)
    check(layer, theirs, layer.whole, truth)


@pytest.fixture(scope="module")
def widths() -> dict[str, torch.Tensor]:
    """Layers as GPTQModel packs and dequantizes them (tests/assets/scripts/pack_gptq_awq.py)."""
    return load_file(tiny_models.ASSETS / "awq-widths.safetensors")


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7, 8])
def test_gptqmodels_own_packing(bits: int, widths: dict[str, torch.Tensor]) -> None:
    stored = {
        name: widths[f"{bits}.{name}"] for name in ("codes", "zeros", "qweight", "qzeros", "scales")
    }
    codes, zeros = stored.pop("codes"), stored.pop("zeros")
    n, k = codes.shape
    truth = Truth(codes.numpy(), zeros.numpy(), stored["scales"].T, 32, bits=bits)
    assert torch.equal(truth.values(0, n, 0, k), widths[f"{bits}.values"].double())
    made = ALL_BUILDS["awq-8bit"].tensors(truth)
    assert all(torch.equal(made[name], stored[name]) for name in stored)
    layer, _ = describe("awq-8bit", truth, 32, stored, bits=bits)
    for region in (layer.whole, Region(8, 19, 16, 56), Region(23, 24, 63, 64)):
        check(layer, stored, region, truth)


@pytest.mark.parametrize("quantizer", ["gptqmodel:7.7.0", ["optimum:1.24", "GPTQModel:8.0"]])
def test_widths_are_told_by_the_tool(quantizer: object) -> None:
    truth = ALL_BUILDS["awq-3bit"].truth(8, 64, 32)
    layer, tensors = describe("awq-3bit", truth, 32, meta={"quantizer": quantizer})
    assert layer.description == "awq 3-bit g32, zero points, resident as 4-bit"
    check(layer, tensors, layer.whole, truth)


@pytest.mark.parametrize("rows", [8, 24, 40])
@pytest.mark.parametrize("build", ["awq-2bit", "awq-3bit"])
def test_words_that_only_scales_can_count(build: str, rows: int) -> None:
    truth = ALL_BUILDS[build].truth(rows, 64, 32)
    layer, tensors = describe(build, truth, 32)
    assert (layer.n, layer.k) == (rows, 64)
    check(layer, tensors, Region(rows - 8, rows, 0, 64), truth)


@pytest.mark.parametrize(("name", "missing"), [("qweight", 1), ("qzeros", 1), ("scales", 4)])
def test_refuses_words_of_another_size(name: str, missing: int) -> None:
    tensors = ALL_BUILDS["awq-8bit"].tensors(ALL_BUILDS["awq-8bit"].truth(16, 64, 32))
    tensors[name] = tensors[name][:, :-missing].contiguous()
    with pytest.raises(PreflightError, match=r"(qweight|qzeros) of shape .*; supported: \["):
        describe("awq-8bit", None, 32, tensors)


@pytest.mark.parametrize("build", AWQ_BUILDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region(build: str, data: st.DataObject) -> None:
    group_size = data.draw(st.sampled_from([32, 64, 128, 192]), "group_size")
    unit = group_size if group_size > 32 else 64
    n, k = 8 * data.draw(st.integers(1, 3), "n/8"), unit * data.draw(st.integers(1, 3), "k/unit")
    truth = AWQ_BUILDS[build].truth(n, k, group_size, seed=data.draw(st.integers(0, 9), "seed"))
    layer, tensors = describe(build, truth, group_size)
    n0, k0 = data.draw(st.integers(0, n - 1), "n0"), data.draw(st.integers(0, k - 1), "k0")
    n1, k1 = data.draw(st.integers(n0 + 1, n), "n1"), data.draw(st.integers(k0 + 1, k), "k1")
    check(layer, tensors, Region(n0, n1, k0, k1), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_zero_point_beside_every_kind_of_scale(dtype: torch.dtype) -> None:
    truth = AWQ_BUILDS["awq-gemv-fast"].truth(16, 512, 32, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal
    scales = torch.tensor([0.01, 1.7, 0.0123, 3.3, 60.0, 1e-3, 5 * tiny, tiny / 4]).to(dtype)
    grid = torch.arange(16)[:, None].expand(16, 16)
    truth = with_fields(truth, zeros=grid.byte().numpy(), scales=scales.repeat(16, 2))
    layer, tensors = describe("awq-gemv-fast", truth, 32)
    check(layer, tensors, layer.whole, truth)


def test_the_description_names_the_packing() -> None:
    found = [
        describe(build, AWQ_BUILDS[build].truth(8, 64, 32), 32)[0].description
        for build in AWQ_BUILDS
    ]
    assert found == ["awq gemv 4-bit g32, zero points", "awq gemv_fast 4-bit g32, zero points"]


@pytest.mark.parametrize(("value", "shown"), [(0.013, "0.013"), (-1.0, "-1"), (torch.nan, "nan")])
def test_refuses_scaled_zero_points_that_are_none(value: float, shown: str) -> None:
    truth = AWQ_BUILDS["awq-gemv-fast"].truth(8, 64, 32)
    layer, tensors = describe("awq-gemv-fast", truth, 32)
    put("qzeros", (1, 3), value)(tensors)
    message = (
        rf"{MODULE}.qzeros: found {shown}\S* beside the scale 0.0.* \(1 such values\), expected"
    )
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(cut(layer, tensors, layer.whole), layer, layer.whole)


@pytest.mark.parametrize("stored", VERSIONS)
@pytest.mark.parametrize("said", VERSIONS)
@pytest.mark.parametrize("n", [64, 128])
def test_a_packing_under_another_name_is_refused(stored: str, said: str, n: int) -> None:
    """Also where K == N, which lets a wrong version through elsewhere."""
    if stored == said:
        return
    truth = ALL_BUILDS[stored].truth(n, 128, 64)
    with pytest.raises(PreflightError, match=r"qweight|qzeros|scales"):
        describe(stored, truth, 64, version=VERSIONS[said])


def test_refuses_groups_that_do_not_fill_k() -> None:
    truth = AWQ_BUILDS["awq-gemv"].truth(8, 192, 128)
    with pytest.raises(PreflightError, match=r"192 in_features, in groups of 128; .* whole groups"):
        describe("awq-gemv", truth, 128)


def test_refuses_columns_that_are_no_whole_blocks() -> None:
    truth = AWQ_BUILDS["awq-gemv-fast"].truth(8, 128, 32)
    tensors = ALL_BUILDS["awq-gemv-fast"].tensors(truth)
    tensors["qweight"] = tensors["qweight"][:, :96]
    with pytest.raises(PreflightError, match=r"qweight of shape \[2, 96\]; supported: \[2, 128\]"):
        describe("awq-gemv-fast", truth, 32, tensors=tensors)
