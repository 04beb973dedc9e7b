"""Fused dequantize-and-multiply kernels for quantized weights; torch and Triton only.

Importing this package imports no Triton: planning runs where there is none.
"""

from fusedq_kernels.layout import (
    empty_packed,
    pack,
    pack_rows,
    packed_shapes,
    unpack,
    weight_bytes,
)
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    KernelName,
    Launch,
    Layout,
    LogicalWeight,
    PackedWeight,
    QuantSpec,
    Reason,
    TileConfig,
    WeightType,
    layout_for,
)

__all__ = [
    "DeviceSpec",
    "GemmShape",
    "KernelName",
    "Launch",
    "Layout",
    "LogicalWeight",
    "PackedWeight",
    "QuantSpec",
    "Reason",
    "TileConfig",
    "WeightType",
    "empty_packed",
    "layout_for",
    "matmul",
    "pack",
    "pack_rows",
    "packed_shapes",
    "unpack",
    "weight_bytes",
]


def __getattr__(name: str) -> object:
    # Registering the operator takes half of the package's import time; planning needs none.
    if name == "matmul":
        from fusedq_kernels.op import matmul

        return matmul
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
