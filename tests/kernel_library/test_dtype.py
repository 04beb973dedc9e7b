"""Element types by name against torch's own."""

import subprocess
import sys

import pytest
import torch

from fusedq_kernels import DType, QuantSpec, WeightType, lazy


@pytest.mark.parametrize("dtype", DType)
def test_torch_agrees(dtype: DType) -> None:
    assert DType.of(dtype.torch) is dtype
    assert DType.of(dtype) is dtype
    assert dtype.itemsize == dtype.torch.itemsize
    assert str(dtype.torch) == f"torch.{dtype}"


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="'complex64' is not a valid DType"):
        DType.of(torch.complex64)


def test_a_spec_keeps_a_torch_dtype_by_name() -> None:
    spec = QuantSpec(WeightType.UINT4, 128, torch.bfloat16)
    assert spec.scale_dtype is DType.BFLOAT16
    assert spec == QuantSpec(WeightType.UINT4, 128, DType.BFLOAT16)


def test_lazy_torch_is_torch_once_it_is_used() -> None:
    assert lazy.torch.float16 is torch.float16
    code = (
        "import sys; from fusedq_kernels.lazy import torch; before = 'torch' in sys.modules\n"
        "torch.int32; print(before, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n"
