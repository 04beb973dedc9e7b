"""Resident weights: their shapes, packing, and unpacking as its exact inverse, in every layout.

`tiled.py` and `wna16.py` draw a layout bit by bit, `geometry.py` pads K and counts
groups. This module checks, works in stripes and dispatches. The readers of a packed weight are
`cuda/` (tiled) and `cpu/` (all); `reference.py` knows logical ones only.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import (
    GroupGeometry,
    Wna16Geometry,
    count_groups,
    group_geometry,
    wna16_geometry,
)
from fusedq_kernels.layouts import bits, resident, scales, wna16
from fusedq_kernels.layouts.tiled import TILED
from fusedq_kernels.types import Layout, LogicalWeight, PackedWeight, QuantSpec

__all__ = [
    "PERM_DTYPE",
    "ROW_ALIGNMENT",
    "GroupGeometry",
    "TensorSpec",
    "Wna16Geometry",
    "count_groups",
    "empty_packed",
    "gather",
    "group_geometry",
    "pack",
    "pack_rows",
    "packed_shapes",
    "stripes",
    "unpack",
    "unpack_rows",
    "weight_bytes",
    "wna16_geometry",
]

# Stripes of rows start and end on this, so that no stripe splits a block of any layout.
ROW_ALIGNMENT = 32

PERM_DTYPE = resident.PERM_DTYPE.torch

# Codes per stripe: on a CPU a stripe and its temporaries stay within a few MB and mostly in cache,
# a GPU wants few launches.
_STRIPE_CODES, _STRIPE_CODES_GPU = 1 << 19, 1 << 24


class TensorSpec(NamedTuple):
    """Shape and dtype of one resident tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def packed_shapes(
    layout: Layout, n: int, k: int, spec: QuantSpec, phase: int, act_dtype: DType | torch.dtype
) -> dict[str, TensorSpec]:
    """`resident.resident_tensors` in torch's dtypes."""
    tensors = resident.resident_tensors(layout, n, k, spec, phase, act_dtype)
    return {name: TensorSpec(each.shape, each.dtype.torch) for name, each in tensors.items()}


def empty_packed(
    layout: Layout,
    n: int,
    k: int,
    spec: QuantSpec,
    phase: int,
    act_dtype: DType | torch.dtype,
    device: torch.device | str,
    in_features: int = 0,
    ordered: bool = False,
) -> PackedWeight:
    """A weight whose every scale is zero, for `pack_rows` to fill; `device` may be meta.

    Where `ordered` it has a `perm` of `in_features`, which the caller fills.
    """
    shapes = packed_shapes(layout, n, k, spec, phase, act_dtype)
    tensors = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in shapes.items()
    }
    perm = torch.zeros(k, dtype=PERM_DTYPE, device=device) if ordered else None
    return PackedWeight(
        *(tensors["qweight"], tensors["scales"], tensors.get("zeros")),
        *(layout, spec, n, k, phase, perm, in_features),
    )


def pack_rows(packed: PackedWeight, start: int, rows: LogicalWeight) -> None:
    """Write `rows` over outputs `[start, start + len(rows))` of `packed`, in place.

    `start` is a multiple of 32, and so is the number of rows unless they end at `packed.n`.
    Raises ValueError for rows of another scheme, shape or dtype than `packed` was made for, and
    for a code or zero point that the layout cannot hold.
    """
    _check_rows(packed, start, rows)
    codec = _CODECS[packed.layout]
    codec.write_groups(packed, start, rows.scales, rows.zeros)
    if rows.row_scales is not None:
        scales.of_rows(packed)[start : start + len(rows.row_scales)] = rows.row_scales
    for first, last in stripes(rows.codes.shape[0], packed.k, packed.qweight.device):
        zeros = None if rows.zeros is None else rows.zeros[first:last]
        codes = rows.codes[first:last]
        bits.check_below(codes, 1 << packed.spec.weight_type.bits, "codes")
        codec.write_codes(packed, start + first, codes, zeros)


def pack(logical: LogicalWeight, layout: Layout, act_dtype: torch.dtype) -> PackedWeight:
    """`logical` in `layout` on the same device, with temporaries of a few MB at a time.

    `act_dtype` becomes the dtype of CPU_WNA16 scales. Raises ValueError as `packed_shapes` and
    `pack_rows` do.
    """
    n, k = logical.codes.shape
    device = logical.codes.device
    packed = empty_packed(
        *(layout, n, k, logical.spec, logical.phase, act_dtype, device),
        in_features=logical.in_features,
        ordered=logical.perm is not None,
    )
    if packed.perm is not None:
        packed.perm.copy_(logical.perm)
    pack_rows(packed, 0, logical)
    return packed


def unpack(packed: PackedWeight) -> LogicalWeight:
    """Inverse of `pack`; scales of CPU_WNA16 come back in the activation dtype."""
    return unpack_rows(packed, 0, packed.n)


def unpack_rows(packed: PackedWeight, start: int, stop: int) -> LogicalWeight:
    """Outputs `[start, stop)` of `unpack(packed)`; `start` is a multiple of 32, and so is `stop`
    unless it is `packed.n`."""
    codec = _CODECS[packed.layout]
    factors, zeros = codec.read_groups(packed, start, stop)
    row_scales = scales.of_rows(packed)
    codes = packed.qweight.new_empty((stop - start, packed.k), dtype=torch.uint8)
    for first, last in stripes(stop - start, packed.k, packed.qweight.device):
        codes[first:last] = codec.read_codes(packed, start + first, start + last)
    return LogicalWeight(
        *(codes, factors, zeros, packed.spec, packed.phase, packed.perm, packed.in_features),
        None if row_scales is None else row_scales[start:stop].clone(),
    )


def gather(packed: PackedWeight, rows: torch.Tensor) -> LogicalWeight:
    """Outputs `rows`, int64 `[M]` below `packed.n`, of `unpack(packed)`; reads no other."""
    found, row_scales = _CODECS[packed.layout].gather(packed, rows), scales.of_rows(packed)
    return LogicalWeight(
        *(*found, packed.spec, packed.phase, packed.perm, packed.in_features),
        None if row_scales is None else row_scales[rows],
    )


def weight_bytes(packed: PackedWeight) -> dict[str, int]:
    """Resident bytes of each tensor, padding included, by field name."""
    names = ("qweight", "scales", "zeros", "perm")
    tensors = {name: getattr(packed, name) for name in names}
    return {name: t.numel() * t.element_size() for name, t in tensors.items() if t is not None}


class _Codec(Protocol):
    """What a layout offers."""

    write_groups: Callable[..., None]
    write_codes: Callable[..., None]
    read_groups: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    read_codes: Callable[..., torch.Tensor]
    gather: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


_CODECS: dict[Layout, _Codec] = {**TILED, Layout.CPU_WNA16: wna16}


def _check_rows(packed: PackedWeight, start: int, rows: LogicalWeight) -> None:
    count, k = rows.codes.shape
    if rows.spec != packed.spec or rows.phase != packed.phase or k != packed.k:
        raise ValueError(
            f"rows of {rows.spec}, phase {rows.phase}, k {k} do not belong in a weight of "
            f"{packed.spec}, phase {packed.phase}, k {packed.k}"
        )
    stop = start + count
    if start % ROW_ALIGNMENT or stop > packed.n or (count % ROW_ALIGNMENT and stop != packed.n):
        raise ValueError(
            f"rows {start}:{stop} of {packed.n} must start and end at multiples of {ROW_ALIGNMENT}"
        )
    grouped = (count, count_groups(k, packed.spec.group_size, packed.phase))
    expected = {
        "codes": ((count, k), torch.uint8),
        "scales": (grouped, packed.spec.scale_dtype.torch),
    }
    if packed.spec.has_zero_points:
        expected["zeros"] = (grouped, torch.uint8)
    elif rows.zeros is not None:
        raise ValueError(f"{packed.spec.weight_type.value} has no zero points")
    if packed.spec.row_scaled:
        expected["row_scales"] = ((count,), torch.float32)
    elif rows.row_scales is not None:
        raise ValueError(f"rows of {packed.spec} have no scales of their own")
    for name, (shape, dtype) in expected.items():
        tensor = getattr(rows, name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            raise ValueError(f"{name} must be {shape} {dtype}, got {found}")


def stripes(
    count: int, k: int, device: torch.device, at_most: int | None = None
) -> Iterator[tuple[int, int]]:
    """`[start, stop)` of consecutive rows of K codes, as many at a time as suit the device.

    `at_most` rows at a time where given, but never fewer than ROW_ALIGNMENT.
    """
    codes = _STRIPE_CODES if device.type == "cpu" else _STRIPE_CODES_GPU
    rows = codes // k if at_most is None else min(codes // k, at_most)
    rows = max(rows - rows % ROW_ALIGNMENT, ROW_ALIGNMENT)
    for start in range(0, count, rows):
        yield start, min(start + rows, count)
