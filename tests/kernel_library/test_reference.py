"""The oracle itself, against values worked out by hand and a loop over elements."""

import pytest
import torch

from fusedq_kernels import reference, testing
from fusedq_kernels.types import LogicalWeight, QuantSpec, WeightType


def test_dequantize_by_hand() -> None:
    spec = QuantSpec(WeightType.UINT4B8, group_size=2, scale_dtype=torch.float16)
    codes = torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    values = reference.dequantize(LogicalWeight(codes, scales, None, spec))
    assert values.dtype == torch.float32
    assert values.tolist() == [[-4.0, 3.5, 0.0, 2.0]]


def test_dequantize_zero_points_and_phase_by_hand() -> None:
    spec = QuantSpec(WeightType.UINT4, group_size=4, scale_dtype=torch.bfloat16)
    codes = torch.tensor([[3, 3, 3, 3]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 0.25]], dtype=torch.bfloat16)
    zeros = torch.tensor([[0, 16]], dtype=torch.uint8)
    values = reference.dequantize(LogicalWeight(codes, scales, zeros, spec, phase=3))
    assert values.tolist() == [[3.0, -3.25, -3.25, -3.25]]


@pytest.mark.parametrize("phase", [0, 5])
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_dequantize_equals_loop(weight_type: WeightType, phase: int) -> None:
    spec = QuantSpec(weight_type, group_size=16, scale_dtype=torch.float16)
    logical = testing.random_logical(3, 40, spec, phase)
    values = reference.dequantize(logical)
    constant = {WeightType.UINT4B8: 8, WeightType.UINT8B128: 128}
    codebook = weight_type.codebook
    for n in range(3):
        for k in range(40):
            group = (k + phase) // 16
            code = int(logical.codes[n, k])
            if codebook is None:
                code -= constant.get(weight_type) or int(logical.zeros[n, group])
            else:
                code = torch.tensor(codebook[code])
            value = code * logical.scales[n, group].float()
            assert values[n, k].item() == value


@pytest.mark.parametrize("act_dtype", [torch.float16, torch.bfloat16])
def test_codebooks_are_rounded_to_the_activations(act_dtype: torch.dtype) -> None:
    spec = QuantSpec(WeightType.NF4, group_size=16, scale_dtype=torch.float32)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    logical = LogicalWeight(codes, torch.full((1, 1), 3.0), None, spec)
    expected = torch.tensor([WeightType.NF4.codebook])
    assert torch.equal(reference.dequantize(logical), expected * 3)
    rounded = expected.to(act_dtype).float() * 3
    assert torch.equal(reference.dequantize(logical, act_dtype), rounded)
    one_hot = testing.one_hot(16, dtype=act_dtype)
    assert torch.equal(reference.matmul(one_hot, logical).t(), rounded.double())


def test_matmul_of_one_hot_reads_a_column() -> None:
    spec = QuantSpec(WeightType.UINT4B8, group_size=16, scale_dtype=torch.float16)
    logical = testing.random_logical(5, 32, spec)
    y = reference.matmul(testing.one_hot(32, [7, 31]), logical, torch.ones(5))
    assert y.dtype == torch.float64
    assert torch.equal(y, reference.dequantize(logical).double().t()[[7, 31]] + 1)


def test_zero_points_are_required() -> None:
    spec = QuantSpec(WeightType.UINT4, group_size=16, scale_dtype=torch.float16)
    codes, scales = torch.zeros((1, 16), dtype=torch.uint8), torch.ones((1, 1)).half()
    with pytest.raises(ValueError, match="uint4 needs zero points"):
        reference.dequantize(LogicalWeight(codes, scales, None, spec))


def test_assert_close_names_the_worst_coordinates() -> None:
    expected = torch.ones(2, 3)
    actual = expected.clone()
    actual[1, 2] = 1.5
    testing.assert_close(actual, expected, max_error=0.5, rms_error=0.21)
    with pytest.raises(AssertionError, match=r"\[1, 2\]: 1.5, expected 1"):
        testing.assert_close(actual, expected, max_error=0.4, rms_error=1.0)
    with pytest.raises(AssertionError, match=r"RMS 2.041e-01"):
        testing.assert_close(actual, expected, max_error=1.0, rms_error=0.2)
    with pytest.raises(AssertionError, match="max error inf"):
        testing.assert_close(torch.full((2, 3), torch.nan), expected, 1.0, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close(actual[:1], expected, 1.0, 1.0)
