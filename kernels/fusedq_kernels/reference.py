"""The oracle in plain PyTorch: what a logical weight is worth and what multiplying by it gives.

Reads `LogicalWeight` only and shares no code with `layouts/packing.py` or the kernels it judges.
"""

import torch

from fusedq_kernels.types import LogicalWeight


def dequantize(logical: LogicalWeight, act_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`(code - zero) * scale` as fp32 `[N, K]`, rows of K as stored; exact for 16-bit scales.

    A codebook's values are rounded to `act_dtype` before scaling, as every kernel does; integers
    need no rounding.
    """
    spec = logical.spec
    features = torch.arange(logical.codes.shape[1], device=logical.codes.device)
    groups = (features + logical.phase) // spec.group_size
    scales = logical.scales.to(torch.float32)[:, groups]
    if spec.weight_type.codebook is not None:
        table = scales.new_tensor(spec.weight_type.codebook).to(act_dtype)
        return table[logical.codes.to(torch.int64)].to(torch.float32) * scales
    values = logical.codes.to(torch.float32)
    if spec.weight_type.bias is not None:
        return (values - spec.weight_type.bias) * scales
    if logical.zeros is None:
        raise ValueError(f"{spec.weight_type.value} needs zero points, got none")
    return (values - logical.zeros.to(torch.float32)[:, groups]) * scales


def matmul(
    x: torch.Tensor, logical: LogicalWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ dequantize(logical, x.dtype).T + bias` for x `[..., K]`, in float64: `[..., N]`.

    With `logical.perm` x is `[..., in_features]` and multiplied as `x[..., perm]`.
    """
    x = x if logical.perm is None else x[..., logical.perm.long()]
    y = x.to(torch.float64) @ dequantize(logical, x.dtype).to(torch.float64).t()
    return y if bias is None else y + bias.to(torch.float64)
