"""Checks of what the operators of `torch.ops.fusedq` are given; ValueErrors name what is wrong."""

from collections.abc import Mapping

import torch

from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.packing import PERM_DTYPE, TensorSpec
from fusedq_kernels.types import PackedWeight, QuantSpec, WeightType

_SCALE_DTYPES = ("float16", "bfloat16", "float32")


def scheme(weight_type: str, group_size: int, scale_dtype: str) -> QuantSpec:
    """The scheme that an operator's plain arguments name."""
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {list(_SCALE_DTYPES)}, got {scale_dtype!r}")
    return QuantSpec(WeightType(weight_type), group_size, DType(scale_dtype))


def check_operands(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    expected: Mapping[str, TensorSpec],
) -> None:
    """Tokens, resident tensors and bias; `expected` is by `PackedWeight` field name, and `bias`."""
    if x.ndim == 0 or x.shape[-1] != packed.in_features:
        raise ValueError(f"x must have shape [..., {packed.in_features}], got {list(x.shape)}")
    device = x.device
    check_tensor("qweight", packed.qweight, expected["qweight"], device)
    check_tensor("scales", packed.scales, expected["scales"], device)
    check_tensor("zeros", packed.zeros, expected.get("zeros"), device)
    if packed.perm is None:
        if packed.in_features != packed.k:
            raise ValueError(f"{packed.in_features} features need a perm to {packed.k} rows")
    else:
        check_tensor("perm", packed.perm, TensorSpec((packed.k,), PERM_DTYPE), device)
    if bias is not None:
        check_tensor("bias", bias, expected["bias"], device)


def check_out(out: torch.Tensor, x: torch.Tensor, n: int) -> None:
    """The tensor to write into, `[..., n]` for tokens x `[..., K]`."""
    if out.shape[-1:] != (n,) or out.shape[:-1] != x.shape[:-1] or out.dtype != x.dtype:
        raise ValueError(
            f"out must be {x.dtype} {[*x.shape[:-1], n]}, got {out.dtype} {list(out.shape)}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.device != x.device:
        raise ValueError(f"out must be on {x.device} like x, got {out.device}")


def check_tensor(
    name: str, tensor: torch.Tensor | None, expected: TensorSpec | None, device: torch.device
) -> None:
    if tensor is None and expected is None:
        return
    if tensor is None or expected is None:
        found = "none" if tensor is None else "one"
        raise ValueError(f"{name} must be {'absent' if expected is None else 'given'}, got {found}")
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        raise ValueError(
            f"{name} must be {expected.dtype} {list(expected.shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like x, got {tensor.device}")
