"""The 4-bit codebooks are those of bitsandbytes."""

import pytest
import torch

from fusedq_kernels.types import WeightType

DTYPES = [torch.float16, torch.bfloat16]


def test_nf4_is_made_of_normal_quantiles():
    """bitsandbytes `create_normal_map`: areas of equal probability on either side of zero."""
    offset = 0.9677083
    upper, lower = (
        torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1])
        for count in (9, 8)
    )
    values = torch.cat([-lower, torch.zeros(1), upper]).sort().values
    expected = (values / values.abs().max()).tolist()
    assert WeightType.NF4.codebook == pytest.approx(expected, abs=1e-6)


def test_fp4_is_sign_exponent_and_mantissa():
    """bitsandbytes: bias 3, one subnormal, the exponent stored upside down; in units of 1/12."""
    for code, entry in enumerate(WeightType.FP4.codebook):
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        value = 2.0 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
        assert entry == (-value if sign else value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_is_exact_in_16_bits(dtype):
    table = torch.tensor(WeightType.FP4.codebook)
    assert torch.equal(table.to(dtype).float(), table)
