"""`torch.ops.fusedq.embedding`: rows of a packed weight by token ids, dequantized.

The same resident weight serves a tied lm_head through `torch.ops.fusedq.matmul`. Importing this
module registers the operator and imports no Triton.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusedq_kernels.layouts import packing
from fusedq_kernels.layouts.packing import PERM_DTYPE, TensorSpec, packed_shapes
from fusedq_kernels.operands import check_tensor, scheme
from fusedq_kernels.types import (
    GatherName,
    Layout,
    LogicalWeight,
    PackedWeight,
    QuantSpec,
)

_SCHEMA = (
    "embedding(Tensor ids, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, int n, "
    "int k, int group_size, str weight_type, str scale_dtype, str layout, str gather, "
    "ScalarType dtype) -> Tensor"
)
# Values that the CPU dequantizes at a time: they stay in a core's cache.
STRIPE_VALUES = 1 << 19

# Ids int64 [M], weight, out [M, K].
Gather = Callable[[torch.Tensor, PackedWeight, torch.Tensor], object]


def embedding(
    ids: torch.Tensor, packed: PackedWeight, gather: GatherName, dtype: torch.dtype
) -> torch.Tensor:
    """`dequantize(packed)[ids]`, each value rounded once to `dtype`.

    Reads the asked rows only. An id outside of `[0, N)` gets a row of zeros: a GPU cannot refuse.

    Args:
        ids: int64 or int32, any shape, on the device of `packed`.
        packed: a weight of N rows (tokens) and K columns, phase 0, in any layout on a CPU and in a
            tiled one (P4, P8, PL4) for triton-gather. With a `perm`, column `perm[k]` of the
            result is row k of the weight.
        gather: a GPU runs triton-gather; a CPU runs cpu-gather, and triton-gather in Triton's
            interpreter.
        dtype: float16 or bfloat16; that of the scales of layout CPU_WNA16.

    Returns:
        rows: `[*ids.shape, K]`, contiguous.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the weight asks for, or a layout
            that `gather` does not read.
    """
    spec = packed.spec
    if packed.phase:
        raise ValueError(f"an embedding starts with whole groups, got phase {packed.phase}")
    return torch.ops.fusedq.embedding(
        ids,
        packed.qweight,
        packed.scales,
        packed.zeros,
        packed.perm,
        packed.n,
        packed.k,
        spec.group_size,
        spec.weight_type.value,
        spec.scale_dtype.value,
        packed.layout.value,
        gather.value,
        dtype,
    )


def _triton_gather(ids: torch.Tensor, packed: PackedWeight, out: torch.Tensor) -> None:
    from fusedq_kernels.cuda.gather import gather_rows

    gather_rows(ids.contiguous(), packed, out)


def _cpu_gather(ids: torch.Tensor, packed: PackedWeight, out: torch.Tensor) -> None:
    known = (ids >= 0) & (ids < packed.n)
    rows = ids * known
    stripe = max(1, STRIPE_VALUES // packed.k)
    for start in range(0, len(rows), stripe):
        stop = start + stripe
        values = _values(packing.gather(packed, rows[start:stop]), out.dtype)
        values.mul_(known[start:stop, None])
        if packed.perm is None:
            out[start:stop] = values
        else:
            out[start:stop].index_copy_(1, packed.perm.long(), values.to(out.dtype))


def _values(rows: LogicalWeight, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `[M, K]`; the entries of a codebook are rounded to `dtype` first."""
    spec, k = rows.spec, rows.codes.shape[1]
    repeats = min(spec.group_size, k)
    scales, zeros = (
        None if each is None else each.to(torch.float32).repeat_interleave(repeats, 1)[:, :k]
        for each in (rows.scales, rows.zeros)
    )
    if spec.weight_type.codebook is not None:
        table = torch.tensor(spec.weight_type.codebook).to(dtype).to(torch.float32)
        return table[rows.codes.int()].mul_(scales)
    values = rows.codes.to(torch.float32)
    return values.sub_(spec.weight_type.bias if zeros is None else zeros).mul_(scales)


_GATHERS: dict[GatherName, Gather] = {
    GatherName.TRITON_GATHER: _triton_gather,
    GatherName.CPU_GATHER: _cpu_gather,
}


class _Call(NamedTuple):
    gather: GatherName
    layout: Layout
    spec: QuantSpec
    shapes: dict[str, TensorSpec]


# Keyed by plain values: hashing an Enum or a dataclass costs more than the rest of a call.
@functools.cache
def _call(
    n: int,
    k: int,
    group_size: int,
    weight_type: str,
    scale_dtype: str,
    layout_name: str,
    gather: str,
    dtype: torch.dtype,
) -> _Call:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float16 or bfloat16, got {dtype}")
    spec = scheme(weight_type, group_size, scale_dtype)
    form, name = Layout(layout_name), GatherName(gather)
    if name is GatherName.TRITON_GATHER and form is Layout.CPU_WNA16:
        raise ValueError(f"{gather} reads tiled layouts, got {layout_name}")
    return _Call(name, form, spec, packed_shapes(form, n, k, spec, 0, dtype))


def _checked(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    n: int,
    k: int,
    *scheme: Any,
) -> tuple[_Call, PackedWeight]:
    call = _call(n, k, *scheme)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, got {ids.dtype}")
    if ids.is_cuda and call.gather is GatherName.CPU_GATHER:
        raise ValueError(f"{call.gather.value} runs on a CPU, ids are on {ids.device}")
    check_tensor("qweight", qweight, call.shapes["qweight"], ids.device)
    check_tensor("scales", scales, call.shapes["scales"], ids.device)
    check_tensor("zeros", zeros, call.shapes.get("zeros"), ids.device)
    if perm is not None:
        check_tensor("perm", perm, TensorSpec((k,), PERM_DTYPE), ids.device)
    return call, PackedWeight(qweight, scales, zeros, call.layout, call.spec, n, k, 0, perm, k)


def _embedding(ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
    call, packed = _checked(ids, *arguments)
    out = torch.empty((ids.numel(), packed.k), dtype=arguments[-1], device=ids.device)
    if ids.numel():
        _GATHERS[call.gather](ids.reshape(-1).long(), packed, out)
    return out.view(*ids.shape, packed.k)


def _embedding_fake(ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
    _, packed = _checked(ids, *arguments)
    return ids.new_empty((*ids.shape, packed.k), dtype=arguments[-1])


if not hasattr(torch.ops.fusedq, "embedding"):
    # Held by the module: the operator goes away with its Library.
    _LIBRARY = torch.library.Library("fusedq", "FRAGMENT")
    _LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl("embedding", _embedding, _key)
    torch.library.register_fake("fusedq::embedding", _embedding_fake, lib=_LIBRARY)
