"""Runs the launches that `heuristics.select` names for tiled weights, by the kernel they name."""

from collections.abc import Callable

import torch

from fusedq_kernels.cuda.gemm import fused_gemm
from fusedq_kernels.cuda.sliced import sliced_gemm
from fusedq_kernels.types import KernelName, Launch, PackedWeight

_LAUNCHERS: dict[KernelName, Callable[..., torch.Tensor]] = {
    KernelName.TRITON_GEMM: fused_gemm,
    KernelName.SLICED_CUBLAS: sliced_gemm,
}


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    launch: Launch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y = x @ dequantize(packed).T + bias`; `gemm.fused_gemm` describes arguments and errors."""
    return _LAUNCHERS[launch.kernel](x, packed, bias, launch, out)
