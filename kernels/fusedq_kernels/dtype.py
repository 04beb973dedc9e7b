"""Element types by name, so that planning needs no torch: importing it takes about two seconds."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DType(StrEnum):
    """The element types of weights and activations, under torch's names."""

    BOOL = "bool"
    UINT8 = "uint8"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT8_E8M0FNU = "float8_e8m0fnu"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @classmethod
    def of(cls, dtype: DType | torch.dtype) -> DType:
        """The member for a torch dtype or for itself; ValueError for any other."""
        return cls(str(dtype).removeprefix("torch."))

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _ITEMSIZE[self]

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of this name."""
        import torch

        return getattr(torch, self.value)


_ITEMSIZE = {
    DType.BOOL: 1,
    DType.UINT8: 1,
    DType.INT8: 1,
    DType.INT16: 2,
    DType.INT32: 4,
    DType.INT64: 8,
    DType.FLOAT8_E4M3FN: 1,
    DType.FLOAT8_E5M2: 1,
    DType.FLOAT8_E8M0FNU: 1,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT32: 4,
    DType.FLOAT64: 8,
}
