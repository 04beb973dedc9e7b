"""Problems and comparisons for tests and benchmarks; `reference.py` is the oracle behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedq_kernels import reference
from fusedq_kernels.layouts.packing import count_groups
from fusedq_kernels.types import LogicalWeight, QuantSpec, WeightType

_WORST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """`expected` is `x @ dequantize(logical, x.dtype).T + bias` in float64, `[M, N]`."""

    x: torch.Tensor
    logical: LogicalWeight
    bias: torch.Tensor | None
    expected: torch.Tensor


def random_logical(n: int, k: int, spec: QuantSpec, phase: int = 0, seed: int = 0) -> LogicalWeight:
    """Uniform codes (but NaN) and zero points, scales around 0.01 that differ in every group.

    8-bit scales cover six octaves; scales of rows lie around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    grouped = (n, count_groups(k, spec.group_size, phase))
    bound = 1 << spec.weight_type.bits
    codes = torch.randint(0, bound, (n, k), generator=generator, dtype=torch.uint8)
    codes = without_nan(codes, spec.weight_type)
    scales = (torch.rand(grouped, generator=generator) + 0.5) * 0.01
    if spec.scale_dtype.itemsize == 1:
        scales = torch.rand(grouped, generator=generator).mul_(6).sub_(9).exp2_()
    zeros = None
    if spec.has_zero_points:
        zeros = torch.randint(0, bound, grouped, generator=generator, dtype=torch.uint8)
    row_scales = torch.rand(n, generator=generator).add_(0.5) if spec.row_scaled else None
    scales = scales.to(spec.scale_dtype.torch)
    return LogicalWeight(codes, scales, zeros, spec, phase, row_scales=row_scales)


def without_nan(codes: torch.Tensor, weight_type: WeightType) -> torch.Tensor:
    """`codes` with the largest number in place of a code that is none."""
    for code in weight_type.nan_codes:
        codes = torch.where(codes == code, code - 1, codes)
    return codes


def one_hot(
    k: int, rows: Sequence[int] | None = None, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Tokens that each read one input feature: `[len(rows), k]`, or `[k, k]` without `rows`."""
    index = torch.arange(k) if rows is None else torch.tensor(rows, dtype=torch.int64)
    x = torch.zeros((len(index), k), dtype=dtype)
    return x.scatter_(1, index[:, None], 1)


def make_problem(
    m: int,
    n: int,
    k: int,
    spec: QuantSpec,
    *,
    phase: int = 0,
    act_dtype: torch.dtype = torch.float16,
    has_bias: bool = False,
    seed: int = 0,
) -> Problem:
    """A random weight, Gaussian tokens `[m, k]` and bias `[n]` in `act_dtype`, and the answer."""
    generator = torch.Generator().manual_seed(seed + 1)
    logical = random_logical(n, k, spec, phase, seed)
    x = torch.randn((m, k), generator=generator).to(act_dtype)
    bias = torch.randn(n, generator=generator).to(act_dtype) if has_bias else None
    return Problem(x, logical, bias, reference.matmul(x, logical, bias))


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, max_error: float, rms_error: float
) -> None:
    """Bound the worst and the root-mean-square error, both relative to the RMS of `expected`.

    A bound of 0 asks for equal values. Raises AssertionError that shows the worst coordinates; a
    value that is not finite where `expected` is counts as infinitely wrong.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if expected.numel() == 0:
        return
    found, wanted = actual.detach().cpu().double(), expected.detach().cpu().double()
    scale = wanted.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    error = (found - wanted).abs().div(scale).nan_to_num(nan=torch.inf)
    worst, rms = error.max().item(), error.square().mean().sqrt().item()
    if worst <= max_error and rms <= rms_error:
        return
    lines = [f"max error {worst:.3e} (bound {max_error:.3e}), RMS {rms:.3e} ({rms_error:.3e})"]
    for flat in error.flatten().topk(min(_WORST_SHOWN, error.numel())).indices:
        at = tuple(int(i) for i in torch.unravel_index(flat, error.shape))
        lines.append(f"  {list(at)}: {found[at].item():.8g}, expected {wanted[at].item():.8g}")
    raise AssertionError("\n".join(lines))
