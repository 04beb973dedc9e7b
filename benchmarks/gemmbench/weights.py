"""Random weights and tokens, made on the device that is measured."""

from collections.abc import Sequence

import torch

from fusedq_kernels import pack, weight_bytes
from fusedq_kernels.encodings import Codebook
from fusedq_kernels.layouts.packing import count_groups
from fusedq_kernels.testing import without_nan
from fusedq_kernels.types import TILED_LAYOUTS, LogicalWeight, PackedWeight, QuantSpec, WeightType


def default_spec(
    weight_type: WeightType, group_size: int | None, k: int, act_dtype: torch.dtype
) -> QuantSpec:
    """What checkpoints of this type use: groups of 128 and scales in the activation dtype, which
    every contender keeps as they are; codebooks: 64 and fp32; floats: fp32.

    A `group_size` of -1 is one group per channel.
    """
    codebook = isinstance(weight_type.encoding, Codebook)
    group = (64 if codebook else 128) if group_size is None else group_size
    return QuantSpec(
        weight_type,
        k if group == -1 else group,
        torch.float32 if weight_type.codebook is not None else act_dtype,
    )


def default_specs(
    weight_type: WeightType, group_sizes: Sequence[int], k: int, act_dtype: torch.dtype
) -> list[QuantSpec]:
    """`default_spec` for each group size; for none: what is published most, 128 and 32."""
    usual = (None,) if weight_type.codebook is not None else (None, 32)
    return [default_spec(weight_type, each, k, act_dtype) for each in group_sizes or usual]


def random_weight(n: int, k: int, spec: QuantSpec, device: torch.device, seed=0) -> LogicalWeight:
    """Uniform codes and zero points, scales that differ in every group; made on `device`."""
    generator = torch.Generator(device).manual_seed(seed)
    bound = 1 << spec.weight_type.bits
    grouped = (n, count_groups(k, spec.group_size, 0))
    options = {"generator": generator, "device": device, "dtype": torch.uint8}
    codes = without_nan(torch.randint(0, bound, (n, k), **options), spec.weight_type)
    scales = torch.rand(grouped, generator=generator, device=device).add_(0.5).mul_(0.01)
    zeros = None
    if spec.has_zero_points:
        # Zero points lie near the middle in checkpoints; 1 and above, as GPTQ v1 can store.
        zeros = torch.randint(bound // 4, 3 * bound // 4, grouped, **options)
    return LogicalWeight(codes, scales.to(spec.scale_dtype.torch), zeros, spec)


def packed_for_gpu(logical: LogicalWeight, act_dtype: torch.dtype) -> PackedWeight:
    """In the layout of our Triton kernels, on the device of `logical`."""
    return pack(logical, TILED_LAYOUTS[logical.spec.weight_type], act_dtype)


def packed_bytes(packed: PackedWeight) -> int:
    """What a packed weight takes, padding included."""
    return sum(weight_bytes(packed).values())


def random_tokens(m: int, k: int, dtype: torch.dtype, device: torch.device, seed=1) -> torch.Tensor:
    """Gaussian activations `[m, k]`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((m, k), generator=generator, device=device).to(dtype)
