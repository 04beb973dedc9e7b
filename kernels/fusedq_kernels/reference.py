"""The oracle in plain PyTorch: what a logical weight is worth and what multiplying by it gives.

Reads `LogicalWeight` only and shares no code with `layouts/packing.py` or the kernels it judges.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

import torch

from fusedq_kernels.activation import SILU, Activation
from fusedq_kernels.types import LogicalWeight


def dequantize(logical: LogicalWeight, act_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`(code - zero) * scale` as fp32 `[N, K]`, rows of K as stored; exact for 16-bit scales.

    A codebook's values are rounded to `act_dtype` before scaling, as every kernel does; integers
    need no rounding. A row's own scale multiplies last, and rounds to fp32.
    """
    weight = _by_groups(logical, act_dtype)
    return weight if logical.row_scales is None else weight * logical.row_scales[:, None]


def _by_groups(logical: LogicalWeight, act_dtype: torch.dtype) -> torch.Tensor:
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


class Expert(NamedTuple):
    """The matrices of an expert: gate and up `[I, H]`, down `[H, I]`.

    Where the activation takes no pairs, both are that of the way up.
    """

    gate: LogicalWeight
    up: LogicalWeight
    down: LogicalWeight


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def activate(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The value of each pair, or of each `gate` where the activation takes no pairs."""
    name, limit, alpha, beta = (getattr(activation, f.name) for f in fields(activation))
    match name.removesuffix("_no_mul"):
        case "silu":
            if limit is not None:
                gate, up = torch.minimum(gate, gate.new_tensor(limit)), up.clamp(-limit, limit)
            value, factor = gate / (1 + torch.exp(-alpha * gate)), up + beta
        case "gelu":
            value, factor = _gelu(gate), up
        case "gelu_tanh":
            value, factor = _gelu_tanh(gate), up
        case "relu2":
            value, factor = torch.where(gate > 0, gate**2, 0.0), up
        case "swiglustep":
            value = torch.minimum(gate / (1 + torch.exp(-gate)), gate.new_tensor(limit))
            factor = up.clamp(-limit, limit)
        case "situ":
            value = alpha * torch.tanh(gate / alpha) / (1 + torch.exp(-gate))
            factor = up if limit is None else limit * torch.tanh(up / limit)
    return value * factor if activation.is_gated else value


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: Mapping[int, Expert],
    activation: Activation = SILU,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it, in float64: `[M, H]`.

    `weights` by the expert's number; an id without any adds nothing.
    """
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, ids in enumerate(topk_ids.tolist()):
        for place, number in enumerate(ids):
            if (expert := weights.get(number)) is None:
                continue
            row = x[token : token + 1]
            gate, up = matmul(row, expert.gate), matmul(row, expert.up)
            hidden = activate(activation, gate, up)
            down = expert.down
            hidden = hidden if down.perm is None else hidden[:, down.perm.long()]
            product = hidden @ dequantize(down, x.dtype).to(torch.float64).t()
            y[token] += topk_weights[token, place].to(torch.float64) * product[0]
    return y
