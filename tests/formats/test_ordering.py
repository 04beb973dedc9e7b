"""Activation reordering: rows sorted by group are worth exactly what the file says, or refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tiny_models
from checkpoints import ORDERED_BUILDS, Truth, put, with_fields
from fusedq_kernels import reference
from fusedq_kernels.types import LogicalWeight
from layers import MODULE, cut, describe
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats import Region
from vllm_fusedq.formats.shared.ordering import order_rows, resident_rows, step_of


def by_feature(weight: LogicalWeight) -> torch.Tensor:
    """What a weight is worth per input feature, fp64 `[N, in_features]`."""
    values = reference.dequantize(weight).double()
    # Padding is worth zero, so that the sum has one term that counts for each feature
    found = torch.zeros(len(values), weight.in_features, dtype=torch.float64)
    return found.index_add_(1, weight.perm.long(), values)


def check(build: str, truth: Truth, region: Region, **options: object) -> LogicalWeight:
    layer, tensors = describe(build, truth, truth.group_size, **options)
    weight = layer.packing.logical(cut(layer, tensors, region), layer, region)
    bounds = (region.n_start, region.n_stop, region.k_start, region.k_stop)
    assert torch.equal(by_feature(weight), truth.values(*bounds))
    assert weight.perm.dtype == torch.int32
    assert (weight.in_features, weight.phase) == (region.k, 0)
    assert len(weight.perm) == weight.codes.shape[1] == resident_rows(layer, region)
    return weight


@pytest.mark.parametrize("build", ORDERED_BUILDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_region(build: str, data: st.DataObject) -> None:
    # 3-bit words straddle in blocks of 32; 6-bit rows are padded to a multiple of 16
    unit = {3: 32, 6: 16}.get(ORDERED_BUILDS[build].bits, 8)
    n, k = unit * data.draw(st.integers(1, 3), "n"), unit * data.draw(st.integers(2, 20), "k")
    group_size = data.draw(st.sampled_from([8, 24, 32, 64, 128]), "group_size")
    seed = data.draw(st.integers(0, 9), "seed")
    truth = ORDERED_BUILDS[build].truth(n, k, group_size, seed=seed)
    if data.draw(st.booleans(), "trivial"):
        truth = with_fields(truth, g_idx=np.arange(k) // group_size)
    n0, k0 = data.draw(st.integers(0, n - 1), "n0"), data.draw(st.integers(0, k - 1), "k0")
    n1, k1 = data.draw(st.integers(n0 + 1, n), "n1"), data.draw(st.integers(k0 + 1, k), "k1")
    check(build, truth, Region(n0, n1, k0, k1))


@pytest.mark.parametrize("bounds", [(0, 192), (0, 96), (96, 192), (40, 150)])
def test_gptqmodels_own_values(bounds: tuple[int, int]) -> None:
    """A layer that GPTQModel packed and dequantized (tests/assets/scripts/pack_gptq.py)."""
    tensors = load_file(tiny_models.ASSETS / "gptq-packing.safetensors")
    values = tensors.pop("values").double()
    truth = ORDERED_BUILDS["gptq-asym-order"].truth(32, 192, 32)
    layer, _ = describe("gptq-asym-order", truth, 32, tensors)
    region = Region(0, 32, *bounds)
    weight = layer.packing.logical(cut(layer, tensors, region), layer, region)
    assert torch.equal(by_feature(weight), values[:, slice(*bounds)])


@pytest.mark.parametrize("build", ["ct-sym-order", "ct-asym-order"])
def test_agrees_with_the_compressed_tensors_package(build: str) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    truth = ORDERED_BUILDS[build].truth(16, 192, 32, dtype=torch.float32)
    layer, tensors = describe(build, truth, 32)
    zeros = None if truth.zeros is None else torch.from_numpy(truth.zeros.astype(np.int8) - 8)
    theirs = dequantize(
        torch.from_numpy(truth.codes.astype(np.int8) - 8),
        truth.scales,
        zeros,
        g_idx=tensors["weight_g_idx"],
    )
    found = by_feature(layer.packing.logical(tensors, layer, layer.whole))
    assert torch.equal(found.float(), theirs)


@pytest.mark.parametrize("bounds", [(0, 192), (32, 160), (40, 150)])
def test_minus_one_throughout_is_the_order_of_in_features(bounds: tuple[int, int]) -> None:
    """What the compressed_tensors package writes where calibration found no order."""
    build = "ct-asym-order"
    plain = with_fields(ORDERED_BUILDS[build].truth(16, 192, 32), g_idx=None)
    layer, tensors = describe(build, with_fields(plain, g_idx=np.full(192, -1)), 32)
    region = Region(0, 16, *bounds)
    found = by_feature(layer.packing.logical(cut(layer, tensors, region), layer, region))
    assert torch.equal(found, plain.values(0, 16, *bounds))


@pytest.mark.parametrize("build", ORDERED_BUILDS)
def test_the_whole_of_k_needs_no_padding(build: str) -> None:
    truth = ORDERED_BUILDS[build].truth(32, 256, 64)
    weight = check(build, truth, Region(0, 32, 0, 256))
    assert sorted(weight.perm.tolist()) == list(range(256))
    assert weight.spec.group_size == 64
    # Rows of one group keep their order, so that equal files give equal bits
    for rows in weight.perm.view(4, 64):
        assert torch.equal(rows, rows.sort().values)
    assert truth.g_idx[weight.perm.numpy()].tolist() == [i // 64 for i in range(256)]


def test_a_part_of_k_by_hand() -> None:
    g_idx = np.array([1, 0] * 2 + [1] * 30 + [0] * 30)
    truth = with_fields(ORDERED_BUILDS["gptq-asym-order"].truth(8, 64, 32), g_idx=g_idx)
    weight = check("gptq-asym-order", truth, Region(0, 8, 0, 40))
    # Group 0 has 8 rows here, group 1 has 32; the worst case of 40 rows takes no third step
    assert resident_rows(describe("gptq-asym-order", truth, 32)[0], Region(0, 8, 0, 40)) == 64
    assert weight.spec.group_size == 32
    assert weight.perm[:8].tolist() == [1, 3, *range(34, 40)]
    assert weight.perm[32:].tolist() == [0, 2, *range(4, 34)]
    assert torch.equal(weight.codes[:, 8:32], weight.zeros[:, :1].expand(8, 24))


# By hand for 4096 in_features, 4 bits, zero points and fp16 scales: rows x (4 bits + 20 / step)
@pytest.mark.parametrize(
    ("group_size", "tp_size", "step", "rows"),
    [(128, 2, 16, 2528), (128, 8, 8, 736), (32, 2, 32, 4096), (32, 8, 8, 1408)],
)
def test_steps_take_the_fewest_bytes(group_size: int, tp_size: int, step: int, rows: int) -> None:
    truth = ORDERED_BUILDS["gptq-asym-order"].truth(8, 4096, group_size)
    layer, _ = describe("gptq-asym-order", truth, group_size)
    region = Region(0, 8, 0, 4096 // tp_size)
    assert (step_of(layer, region), resident_rows(layer, region)) == (step, rows)


@pytest.mark.parametrize("k_stop", [1, 40, 128, 192, 320, 1000])
@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 48, 128])
def test_the_worst_case_is_reached_and_never_passed(group_size: int, k_stop: int) -> None:
    k = 1024
    truth = ORDERED_BUILDS["gptq-sym-order"].truth(8, k, group_size)
    layer, _ = describe("gptq-sym-order", truth, group_size)
    region, groups = Region(0, 8, 0, k_stop), -(-k // group_size)
    step = step_of(layer, region)
    counts = [0] * groups
    # One row in each group, then a step more wherever it fits, then what is left
    for size, below in ((1, 1), (step, group_size), (1, group_size)):
        for g in range(groups):
            while counts[g] < below and counts[g] + size <= group_size:
                if sum(counts) + size > k_stop:
                    break
                counts[g] += size
    g_idx = torch.tensor([g for g in range(groups) for _ in range(counts[g])])
    assert len(g_idx) == k_stop
    order = order_rows(g_idx, "g_idx", layer, region)
    rows = step * sum(-(-count // step) for count in counts)
    assert resident_rows(layer, region) == rows + rows % 16
    assert len(order.perm) - len(order.padding) == k_stop


@pytest.mark.parametrize(("value", "k_stop"), [(-1, 64), (2, 64), (7, 40)])
def test_refuses_groups_that_do_not_exist(value: int, k_stop: int) -> None:
    truth = ORDERED_BUILDS["gptq-sym-order"].truth(8, 64, 32)
    layer, tensors = describe("gptq-sym-order", truth, 32)
    put("g_idx", (5,), value)(tensors)
    region = Region(0, 8, 0, k_stop)
    message = f"{MODULE}.g_idx: found group {value}, expected 0 to 1 .64 in_features, group_size 32"
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(cut(layer, tensors, region), layer, region)


@pytest.mark.parametrize("k_stop", [64, 48])
def test_refuses_groups_of_another_size(k_stop: int) -> None:
    truth = ORDERED_BUILDS["gptq-sym-order"].truth(8, 64, 32)
    layer, tensors = describe("gptq-sym-order", truth, 32)
    tensors["g_idx"] = torch.tensor([1] * 33 + [0] * 31).int()
    region = Region(0, 8, 0, k_stop)
    found = (31, 0) if k_stop == 64 else (33, 1)
    message = f"found {found[0]} in_features in group {found[1]}, expected 32; correct group_size"
    with pytest.raises(WeightLoadError, match=message):
        layer.packing.logical(cut(layer, tensors, region), layer, region)


def test_an_order_without_g_idx_is_refused() -> None:
    truth = ORDERED_BUILDS["gptq-sym-order"].truth(8, 64, 32)
    with pytest.raises(PreflightError, match=r"no tensor g_idx \(only qweight, qzeros, scales"):
        describe("gptq-sym-v2", with_fields(truth, g_idx=None), 32, desc_act=True)


@pytest.mark.parametrize("options", [{"desc_act": False}, {"static_groups": True}])
def test_an_order_that_the_config_denies_is_refused(options: dict[str, object]) -> None:
    truth = ORDERED_BUILDS["gptq-sym-order"].truth(8, 64, 32)
    layer, tensors = describe("gptq-sym-order", truth, 32, **options)
    assert layer.description == "gptq 4-bit g32, symmetric"
    with pytest.raises(WeightLoadError, match="without activation reordering; set desc_act to"):
        layer.packing.logical(tensors, layer, layer.whole)


def test_the_description_names_the_order() -> None:
    truth = ORDERED_BUILDS["gptq-asym-order"].truth(8, 64, 32)
    layer, _ = describe("gptq-asym-order", truth, 32)
    assert layer.description == "gptq 4-bit g32, zero points, act-order"
