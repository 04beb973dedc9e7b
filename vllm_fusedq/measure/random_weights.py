"""Random weights and tokens, made on the device that is measured."""

import torch

from fusedq_kernels.layouts.packing import count_groups
from fusedq_kernels.testing import without_nan
from fusedq_kernels.types import LogicalWeight, QuantSpec


def random_weight(
    n: int, k: int, spec: QuantSpec, device: torch.device, seed: int = 0, phase: int = 0
) -> LogicalWeight:
    """Uniform codes and zero points, scales that differ in every group; made on `device`."""
    generator = torch.Generator(device).manual_seed(seed)
    bound = 1 << spec.weight_type.bits
    grouped = (n, count_groups(k, spec.group_size, phase))
    options = {"generator": generator, "device": device, "dtype": torch.uint8}
    codes = without_nan(torch.randint(0, bound, (n, k), **options), spec.weight_type)
    scales = torch.rand(grouped, generator=generator, device=device).add_(0.5).mul_(0.01)
    row_scales = None
    if spec.row_scaled:
        row_scales = torch.rand(n, generator=generator, device=device).add_(0.5)
    zeros = None
    if spec.has_zero_points:
        # Zero points lie near the middle in checkpoints; 1 and above, as GPTQ v1 can store.
        zeros = torch.randint(bound // 4, 3 * bound // 4, grouped, **options)
    scales = scales.to(spec.scale_dtype.torch)
    return LogicalWeight(codes, scales, zeros, spec, phase, row_scales=row_scales)


def random_tokens(
    m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 1
) -> torch.Tensor:
    """Gaussian activations `[m, k]`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((m, k), generator=generator, device=device).to(dtype)
