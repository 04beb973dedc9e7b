"""`activation.Activation` in plain PyTorch, for the experts of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.activation import Activation
from fusedq_kernels.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def activated(activation: Activation, sums: Tensor) -> Tensor:
    """fp32 `[M, N / 2]` of sums fp32 `[M, N]` of gate and up in turn, `[M, N]` of a plain one."""
    from fusedq_kernels.layouts.stacked import apart

    if not activation.is_gated:
        return _PLAIN[activation.name](sums)
    return _GATED[activation.name](activation, *apart(sums)).flatten(1)


def _silu(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    if (activation.alpha, activation.beta) == (1.0, 0.0):
        return torch.nn.functional.silu(gate).mul_(up)
    return torch.sigmoid(activation.alpha * gate).mul_(gate).mul_(up + activation.beta)


def _gelu(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate).mul_(up)


def _gelu_tanh(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)


def _swiglustep(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    limit = activation.limit
    return torch.nn.functional.silu(gate).clamp_(max=limit).mul_(up.clamp(-limit, limit))


def _situ(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    if activation.limit is not None:
        up = activation.limit * torch.tanh(up / activation.limit)
    alpha = activation.alpha
    return torch.tanh(gate / alpha).mul_(alpha).mul_(torch.sigmoid(gate)).mul_(up)


_GATED: dict[str, Callable[[Activation, Tensor, Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "swiglustep": _swiglustep,
    "situ": _situ,
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": lambda x: torch.nn.functional.silu(x),
    "gelu_no_mul": lambda x: torch.nn.functional.gelu(x),
    "gelu_tanh_no_mul": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2_no_mul": lambda x: torch.relu(x).square_(),
}
