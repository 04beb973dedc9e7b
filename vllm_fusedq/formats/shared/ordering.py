"""Activation reordering: rows of K sorted by group, so that every group is one run of rows again.

A whole K, sorted, is an ordinary weight whose activation is gathered. A rank's part of K holds any
number of rows of each group, so there each group's rows are padded to whole steps and every step is
a group of its own, with its group's scale repeated. That is exact; what it costs, at most, follows
from sizes alone (`resident_rows`), because a plan is made before any value is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight, QuantSpec
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import LayerFormat, Region

# Groups that every kernel takes; small ones save padding, large ones scales.
STEPS = (32, 16, 8)
# Kernels take rows in multiples of it.
ROW_MULTIPLE = 16


class RowOrder(NamedTuple):
    """Where the rows of a region go, on the device of g_idx.

    `perm` int64 `[rows]` is the region's row that each resident row holds; `padding` lists the
    resident rows that hold none; `groups` is the checkpoint's group of each resident group.
    """

    perm: torch.Tensor
    padding: torch.Tensor
    groups: torch.Tensor


def step_of(layer: LayerFormat, region: Region) -> int:
    """Rows per step of a part of K: those that take the fewest bytes, scales included."""
    spec, bits = layer.spec, layer.spec.weight_type.bits
    per_step = 8 * spec.scale_dtype.itemsize + bits * spec.has_zero_points

    def size(step: int) -> float:
        return _padded_rows(layer, region, step) * (bits + per_step / step)

    return min(STEPS, key=size)


def resident_rows(layer: LayerFormat, region: Region) -> int:
    """Rows that a region of a reordered layer takes, whatever its g_idx says."""
    if region.k == layer.k:
        return layer.k
    return _padded_rows(layer, region, step_of(layer, region))


def _padded_rows(layer: LayerFormat, region: Region, step: int) -> int:
    """The worst case: a row in every group opens a step there, then `step` more another one."""
    groups = _num_groups(layer)
    opened = min(groups, region.k)
    more = min((region.k - opened) // step, groups * ((layer.spec.group_size - 1) // step))
    return -(-step * (opened + more) // ROW_MULTIPLE) * ROW_MULTIPLE


def resident_spec(layer: LayerFormat, region: Region) -> QuantSpec:
    """The scheme of the sorted rows."""
    return (
        layer.spec
        if region.k == layer.k
        else replace(layer.spec, group_size=step_of(layer, region))
    )


def sort_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor,
    name: str,
    layer: LayerFormat,
    region: Region,
) -> LogicalWeight:
    """Sort the rows of a region by group.

    Args:
        codes: uint8 `[n, region.k]` as stored.
        scales, zeros: `[n, G]` of all groups of the layer; zeros None where there are none.
        g_idx: integers `[region.k]`, the group of each row.
        name: what the format calls g_idx, for messages.

    Raises:
        WeightLoadError: g_idx names a group that does not exist, or fills one wrongly.
    """
    order = order_rows(g_idx, name, layer, region)
    # On a CPU index_select gathers columns eight times as slowly
    codes = codes.gather(1, order.perm.expand(len(codes), -1))
    scales = scales.index_select(1, order.groups)
    if zeros is not None:
        zeros = zeros.index_select(1, order.groups)
        codes[:, order.padding] = zeros[:, order.padding // step_of(layer, region)]
    else:
        codes[:, order.padding] = layer.spec.weight_type.bias
    spec = resident_spec(layer, region)
    return LogicalWeight(codes, scales, zeros, spec, 0, order.perm.int(), region.k)


def _stable_order(group_of: torch.Tensor, num_groups: int) -> torch.Tensor:
    if group_of.is_cuda:
        return torch.argsort(group_of, stable=True)
    # numpy sorts integers of 16 bits by radix; every stripe of rows sorts again
    narrow = group_of.to(torch.int16) if num_groups < 1 << 15 else group_of
    return torch.from_numpy(narrow.numpy().argsort(kind="stable"))


def order_rows(g_idx: torch.Tensor, name: str, layer: LayerFormat, region: Region) -> RowOrder:
    """The stable order of a region's rows by group; raises as `sort_rows` does."""
    group_of, num_groups = checked_groups(g_idx, name, layer), _num_groups(layer)
    counts = torch.bincount(group_of, minlength=num_groups)
    _check_counts(counts, name, layer, region)
    perm = _stable_order(group_of, num_groups)
    groups = torch.arange(num_groups, device=g_idx.device)
    if region.k == layer.k:
        return RowOrder(perm, perm[:0], groups)
    step = step_of(layer, region)
    steps = (counts + step - 1) // step
    sorted_groups = group_of[perm]
    # A row's place: its group's first step, plus its number within the group
    first_row, first_slot = counts.cumsum(0) - counts, step * (steps.cumsum(0) - steps)
    within = torch.arange(region.k, device=g_idx.device) - first_row[sorted_groups]
    slots = first_slot[sorted_groups] + within
    rows = resident_rows(layer, region)
    padded = perm.new_zeros(rows)
    padded[slots] = perm
    empty = torch.ones(rows, dtype=torch.bool, device=g_idx.device)
    empty[slots] = False
    step_groups = perm.new_zeros(rows // step)
    step_groups[: int(steps.sum())] = groups.repeat_interleave(steps)
    return RowOrder(padded, empty.nonzero()[:, 0], step_groups)


def checked_groups(g_idx: torch.Tensor, name: str, layer: LayerFormat) -> torch.Tensor:
    """g_idx in int64; WeightLoadError where it names a group that does not exist."""
    group_of, num_groups = g_idx.long(), _num_groups(layer)
    low, high = (int(bound) for bound in group_of.aminmax())
    if low < 0 or high >= num_groups:
        raise WeightLoadError(
            f"{layer.module}.{name}: found group {low if low < 0 else high}, expected 0 to "
            f"{num_groups - 1} ({layer.k} in_features, group_size {layer.spec.group_size}); "
            "download the checkpoint again or quantize the model again"
        )
    return group_of


def _check_counts(counts: torch.Tensor, name: str, layer: LayerFormat, region: Region) -> None:
    """No group holds more rows than its size; where all of K is there, none holds fewer."""
    expected = torch.full_like(counts, layer.spec.group_size)
    expected[-1] = layer.k - (len(counts) - 1) * layer.spec.group_size
    wrong = counts != expected if region.k == layer.k else counts > layer.spec.group_size
    if bool(wrong.any()):
        group = int(wrong.nonzero()[0])
        raise WeightLoadError(
            f"{layer.module}.{name}: found {int(counts[group])} in_features in group {group}, "
            f"expected {int(expected[group])}; correct group_size in the config, or quantize the "
            "model again"
        )


def _num_groups(layer: LayerFormat) -> int:
    return -(-layer.k // layer.spec.group_size)
