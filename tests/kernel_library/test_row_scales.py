"""8-bit scales, and scales of rows beside them: resident exactly, multiplied exactly.

E2M1 beside both is NVFP4; the float64 answers here read codes by a table of their own.
"""

from dataclasses import replace

import pytest
import torch

from fusedq_kernels import ops
from fusedq_kernels.call import Call
from fusedq_kernels.cuda import sliced
from fusedq_kernels.layouts import packing
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.testing import one_hot, random_logical
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    Launch,
    LogicalWeight,
    QuantSpec,
    TileConfig,
    WeightType,
)

E2M1, E4M3, E8M0 = WeightType.FLOAT4_E2M1F, torch.float8_e4m3fn, torch.float8_e8m0fnu
SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = torch.tensor([*SIZES, *(-size for size in SIZES)], dtype=torch.float64)
# Words of one, two and four groups, cut ones, and one group for all of K
SHAPES = [(16, 256, 0), (32, 272, 16), (64, 320, 0), (128, 384, 64), (400, 400, 0)]
TILES = [
    TileConfig(16, 64, 1, 4, 3),
    TileConfig(16, 64, 2, 4, 3, scale_weights=True),
    TileConfig(16, 64, 1, 4, 3, segments=2, scale_steps=True),
]
N = 40


def weight_of(shape: tuple[int, int, int], scales: torch.dtype, by_rows: bool) -> LogicalWeight:
    group_size, k, phase = shape
    return random_logical(N, k, QuantSpec(E2M1, group_size, scales, by_rows), phase)


def exact(logical: LogicalWeight) -> torch.Tensor:
    groups = (torch.arange(logical.codes.shape[1]) + logical.phase) // logical.spec.group_size
    values = TABLE[logical.codes.long()] * logical.scales.double()[:, groups]
    return values if logical.row_scales is None else values * logical.row_scales.double()[:, None]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Rounded to fp32 and then to its own dtype."""
    units = torch.finfo(found.dtype).eps / 2 + 2**-23
    smallest = torch.finfo(found.dtype).smallest_normal * units
    assert ((found.double() - expected).abs() <= expected.abs() * units + smallest).all()


cases = pytest.mark.parametrize(
    ("shape", "scales", "by_rows"),
    [(shape, *each) for shape in SHAPES for each in ((E4M3, 1), (E8M0, 0))],
)


@cases
def test_the_resident_bits_come_back(shape: tuple, scales: torch.dtype, by_rows: int) -> None:
    logical = weight_of(shape, scales, bool(by_rows))
    packed = pack(logical, TILED_LAYOUTS[E2M1], torch.bfloat16)
    rows = torch.tensor([3, 39, 17])
    for found, of in ((packing.unpack(packed), slice(None)), (packing.gather(packed, rows), rows)):
        assert torch.equal(found.codes, logical.codes[of])
        assert found.scales.dtype == scales
        assert torch.equal(found.scales.float(), logical.scales[of].float())
        assert (found.row_scales is None) == (not by_rows)
        assert not by_rows or torch.equal(found.row_scales, logical.row_scales[of])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases
def test_every_kernel_multiplies_by_both(
    shape: tuple, scales: torch.dtype, by_rows: int, dtype: torch.dtype
) -> None:
    """One product and zeros."""
    logical = weight_of(shape, scales, bool(by_rows))
    packed = pack(logical, TILED_LAYOUTS[E2M1], dtype)
    expected, x = exact(logical).T, one_hot(shape[1], dtype=dtype)
    for kernel in ("cpu-fused", "cpu-striped"):
        close(torch.cat([ops.matmul(x[:1], packed, None, kernel)]), expected[:1])
        close(ops.matmul(x, packed, None, kernel), expected)
    few = list(range(0, shape[1], 23))
    for tile in TILES:
        y = ops.run(x[few], packed, None, Launch("triton-gemm", tile, "test"))
        close(y, expected[few])
    out = torch.empty(N, shape[1], dtype=dtype)
    close(sliced.dequantize(packed, out), expected.T)
    if not shape[2]:
        ids = torch.tensor([3, N - 1])
        for kernel in ("cpu-gather", "triton-gather"):
            close(ops.embedding(ids, packed, kernel, dtype), expected.T[ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_times_their_scales_are_16_bit_numbers(dtype: torch.dtype) -> None:
    """Every code by every scale of E4M3: six significant bits, in the range of both dtypes."""
    scales = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    products = TABLE[:, None] * scales
    assert torch.equal(products.to(dtype).double(), products)


def test_a_bias_is_added_to_the_scaled_sum() -> None:
    logical = weight_of((16, 256, 0), E4M3, True)
    packed = pack(logical, TILED_LAYOUTS[E2M1], torch.bfloat16)
    bias, x = torch.randn(N).bfloat16(), torch.zeros(3, 256).bfloat16()
    for kernel in ("cpu-fused", "cpu-striped", "triton-gemm"):
        assert torch.equal(ops.matmul(x, packed, bias, kernel), bias.expand(3, N))


def test_the_text_of_a_call_says_both() -> None:
    packed = pack(weight_of((16, 256, 0), E4M3, True), TILED_LAYOUTS[E2M1], torch.bfloat16)
    call = Call.of(packed, "triton-gemm", torch.bfloat16)
    text = "triton-gemm P4 float4_e2m1f g16 phase 0 float8_e4m3fn by rows [40 x 256] bfloat16"
    assert call.text == text
    assert Call.parse(text) == call


def test_weights_that_do_not_fit_are_refused() -> None:
    logical = weight_of((16, 256, 0), E4M3, True)
    with pytest.raises(ValueError, match="row_scales must be"):
        pack(replace(logical, row_scales=logical.row_scales[:-1]), TILED_LAYOUTS[E2M1], torch.half)
    plain = weight_of((16, 256, 0), E4M3, False)
    with pytest.raises(ValueError, match="have no scales of their own"):
        pack(replace(plain, row_scales=logical.row_scales), TILED_LAYOUTS[E2M1], torch.half)
    spec = QuantSpec(WeightType.UINT4B8, 32, torch.float16, row_scaled=True)
    with pytest.raises(ValueError, match="layout CPU_WNA16 does not hold scales of rows"):
        packing.packed_shapes(packing.Layout.CPU_WNA16, 64, 64, spec, 0, torch.float16)
