"""cpu-striped: a few output features at a time, in fp32, with PyTorch's own operators.

It needs no compiler, takes every group size and phase that a tiled layout packs and holds at most a
few MB of dequantized weight. Much slower than cpu-fused: it decodes in separate passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedq_kernels.choose import refusals
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import GemmShape, Launch, QuantSpec, Reason

if TYPE_CHECKING:
    from fusedq_kernels.call import Call

# fp32 weights of one stripe: small enough to stay in a core's L2 cache until multiplied.
STRIPE_BYTES = 2 << 20


def refuses(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Against K, scheme and phase of a rank's weight."""
    return refusals.of_tiled_scales(spec)


def cautions(spec: QuantSpec, act_dtype: DType) -> tuple[str, ...]:
    """What a layer loses here."""
    slow = "decodes a few output features at a time, many times slower than cpu-fused"
    return (f"cpu-striped {slow}",)


def scratch_bytes(launch: Launch, shape: GemmShape) -> int:
    """The largest of what a call allocates: fp32 tokens and outputs, a stripe of weights."""
    return max(4 * shape.m * max(shape.n, shape.k), 2 * STRIPE_BYTES)


def prepare(call: Call, tile: None = None) -> Callable[..., None]:
    """`run(x, qweight, scales, zeros, bias, out)` for one layer; see `catalogue.Kernel.prepare`.

    A result is summed in fp32 and rounded once.
    """
    from fusedq_kernels.layouts.scales import of_rows
    from fusedq_kernels.layouts.tiled import TILED

    codec, weight_type = TILED[call.layout], call.spec.weight_type
    geometry = group_geometry(call.k, call.spec.group_size, call.phase)
    steps = torch.arange(0, geometry.k_padded, geometry.step)
    # Padding behind the last feature may reach past the last group.
    groups = ((steps + geometry.offset) // call.spec.group_size).clamp_(max=geometry.num_groups - 1)
    features = slice(geometry.pad, geometry.pad + call.k)
    stripe = max(1, STRIPE_BYTES // (4 * geometry.k_padded))
    table = None
    if weight_type.codebook is not None:
        table = torch.tensor(weight_type.codebook).to(call.dtype.torch).to(torch.float32)

    def run(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        packed = call.packed(qweight, scales, zeros)
        shape = (min(stripe, call.n), len(steps), geometry.step)
        buffer = torch.empty(shape, dtype=torch.float32)
        tokens = x.to(torch.float32)
        for start in range(0, call.n, stripe):
            stop = min(start + stripe, call.n)
            factors, offsets = codec.read_groups(packed, start, stop)
            weight = buffer[: stop - start]
            codes = codec.padded_codes(packed, start, stop)
            if table is not None:
                torch.index_select(table, 0, codes.flatten().int(), out=weight.view(-1))
            else:
                weight.copy_(codes.view_as(weight))
                weight.sub_(weight_type.bias if offsets is None else offsets[:, groups, None])
            weight.mul_(factors.to(torch.float32)[:, groups, None])
            part = tokens @ weight.flatten(1)[:, features].t()
            if (rows := of_rows(packed)) is not None:
                part *= rows[start:stop]
            if bias is not None:
                part += bias[start:stop]
            out[:, start:stop] = part

    return run
