"""Integer codes of any width in the 4- and 8-bit weight types that the kernels have, exactly.

A code needs no more than the next wider type. A zero point that is stored comes along as it is; a
constant one moves to the wider type's: 3-bit `code - 4` is 4-bit `(code + 4) - 8`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedq_kernels.types import WeightType
from vllm_fusedq.formats.layer import LayerFormat

if TYPE_CHECKING:
    import torch


def resident_type(bits: int, symmetric: bool) -> WeightType:
    """The narrowest weight type that holds codes of `bits` bits (at most 8)."""
    if bits <= 4:
        return WeightType.UINT4B8 if symmetric else WeightType.UINT4
    return WeightType.UINT8B128 if symmetric else WeightType.UINT8


def symmetric_zero(bits: int) -> int:
    """The constant zero point of unsigned codes of `bits` bits."""
    return 1 << (bits - 1)


def widen(codes: torch.Tensor, layer: LayerFormat) -> torch.Tensor:
    """Codes as stored to codes of the layer's weight type, in place."""
    bias = layer.spec.weight_type.bias
    shift = 0 if bias is None else bias - symmetric_zero(layer.packing.bits)
    return codes.add_(shift) if shift else codes
