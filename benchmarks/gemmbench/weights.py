"""What checkpoints of a weight type use, and weights in the layout of the GPU kernels."""

from collections.abc import Sequence

import torch

from fusedq_kernels import pack, weight_bytes
from fusedq_kernels.call import SCALES_OF
from fusedq_kernels.dtype import DType
from fusedq_kernels.encodings import Codebook
from fusedq_kernels.types import TILED_LAYOUTS, LogicalWeight, PackedWeight, QuantSpec, WeightType


def default_spec(
    weight_type: WeightType, group_size: int | None, k: int, act_dtype: torch.dtype
) -> QuantSpec:
    """What checkpoints of this type use: groups of 128 and scales in the activation dtype, which
    every contender keeps as they are; codebooks: 64 and fp32; 8-bit floats: fp32; 4-bit ones:
    groups of 16, E4M3 and a scale of each row.

    A `group_size` of -1 is one group per channel.
    """
    if DType.FLOAT8_E4M3FN in SCALES_OF[weight_type]:
        group = 16 if group_size is None else group_size
        size = k if group == -1 else group
        return QuantSpec(weight_type, size, DType.FLOAT8_E4M3FN, row_scaled=True)
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


def packed_for_gpu(logical: LogicalWeight, act_dtype: torch.dtype) -> PackedWeight:
    """In the layout of our Triton kernels, on the device of `logical`."""
    return pack(logical, TILED_LAYOUTS[logical.spec.weight_type], act_dtype)


def packed_bytes(packed: PackedWeight) -> int:
    """What a packed weight takes, padding included."""
    return sum(weight_bytes(packed).values())
