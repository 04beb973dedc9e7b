"""Fused dequantize-and-multiply kernels for quantized weights; torch and Triton only.

Importing this package imports neither: planning needs none, and runs where there is no Triton.
"""

from importlib import import_module

from fusedq_kernels.dtype import DType
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    Launch,
    Layout,
    LogicalWeight,
    PackedWeight,
    Policy,
    QuantSpec,
    Reason,
    TileConfig,
    WeightType,
)

__all__ = [
    "DType",
    "DeviceSpec",
    "GemmShape",
    "Launch",
    "Layout",
    "LogicalWeight",
    "PackedWeight",
    "Policy",
    "QuantSpec",
    "Reason",
    "TileConfig",
    "WeightType",
    "empty_packed",
    "matmul",
    "pack",
    "pack_rows",
    "packed_shapes",
    "unpack",
    "weight_bytes",
]


_LAYOUT_NAMES = ("empty_packed", "pack", "pack_rows", "packed_shapes", "unpack", "weight_bytes")
_IMPORTED_WHEN_USED = {"matmul": "ops", **dict.fromkeys(_LAYOUT_NAMES, "layouts.packing")}


def __getattr__(name: str) -> object:
    if name in _IMPORTED_WHEN_USED:
        return getattr(import_module(f"fusedq_kernels.{_IMPORTED_WHEN_USED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
