"""Scales and zero points of the tiled layouts: `[rows, groups]` into words and back, exactly.

And scales of whole rows, which lie behind them.

`resident.scale_words` says the shape, `tiled.py` draws the words.
"""

import torch

from fusedq_kernels.geometry import group_geometry, round_up
from fusedq_kernels.layouts.resident import ScaleWords, kept_dtype, scale_words
from fusedq_kernels.types import PackedWeight

# Rows r and r + 8 of a unit share a word.
_UNIT = 16


def write(
    packed: PackedWeight, start: int, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """Write `[rows, G]` of outputs from `start`, a multiple of 16, on.

    Rows that fill up the last unit become zero.
    """
    words, scales = _words_of(packed), scales.to(_kept(packed))
    if words.rows == 2:
        _halves(packed, words, start, start + len(scales)).copy_(
            _filled(scales.contiguous().view(torch.int16), words, _UNIT)
            .view(-1, 2, _UNIT // 2, words.vectors, words.vector)
            .permute(3, 0, 2, 4, 1)
        )
        return
    target = packed.scales[: words.vectors, start : start + len(scales)]
    if zeros is None:
        target.copy_(_by_vector(_filled(scales, words), words))
        return
    target.copy_(_by_vector(_filled(scales.contiguous().view(torch.int16), words), words))
    target.bitwise_left_shift_(16).bitwise_or_(_by_vector(_filled(zeros, words), words))


def read(packed: PackedWeight, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points `[stop - start, G]` of outputs `[start, stop)`."""
    words = _words_of(packed)
    if words.rows == 2:
        rows = _halves(packed, words, start, stop).permute(1, 4, 2, 0, 3).flatten(0, 2)
        first = start % _UNIT
        return _paired(packed, rows[first : first + stop - start]), None
    return _alone(packed, packed.scales[: words.vectors, start:stop].transpose(0, 1))


def of_rows(packed: PackedWeight) -> torch.Tensor | None:
    """The scales of rows, a view fp32 `[n_padded]`; None where rows have none."""
    if not packed.spec.row_scaled:
        return None
    words = _words_of(packed)
    tail = packed.scales[words.vectors :].view(torch.float32).view(-1)
    return tail[: packed.scales.shape[1] * words.rows]


def gather(packed: PackedWeight, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points `[M, G]` of outputs `rows`, int64 `[M]`."""
    words = _words_of(packed)
    if words.rows == 2:
        half = _UNIT // 2
        grouped = packed.scales[: words.vectors]
        found = grouped.index_select(1, rows // _UNIT * half + rows % half)
        halves = found.view(torch.int16).unflatten(-1, (words.vector, 2))
        which = (rows // half % 2).view(1, -1, 1, 1).expand(*halves.shape[:-1], 1)
        return _paired(packed, halves.gather(-1, which)[..., 0].transpose(0, 1)), None
    grouped = packed.scales[: words.vectors].index_select(1, rows)
    return _alone(packed, grouped.transpose(0, 1))


def _words_of(packed: PackedWeight) -> ScaleWords:
    groups = group_geometry(packed.k, packed.spec.group_size, packed.phase)
    return scale_words(packed.spec, groups)


def _kept(packed: PackedWeight) -> torch.dtype:
    return kept_dtype(packed.spec.scale_dtype).torch


def _num_groups(packed: PackedWeight) -> int:
    return group_geometry(packed.k, packed.spec.group_size, packed.phase).num_groups


def _halves(packed: PackedWeight, words: ScaleWords, start: int, stop: int) -> torch.Tensor:
    """The units that hold outputs `[start, stop)`, a view `[vectors, units, 8, vector, 2]`."""
    # Little-endian: the lower half of a word comes first.
    grouped = packed.scales[: words.vectors].view(torch.int16)
    halves = grouped.view(words.vectors, -1, _UNIT // 2, words.vector, 2)
    return halves[:, start // _UNIT : -(-stop // _UNIT)]


def _filled(tensor: torch.Tensor, words: ScaleWords, unit: int = 1) -> torch.Tensor:
    """`[rows, G]` with zeros up to whole units and vectors; no copy where it has them."""
    shape = (round_up(len(tensor), unit), words.vectors * words.vector)
    if tuple(tensor.shape) == shape:
        return tensor.contiguous()
    filled = tensor.new_zeros(shape)
    filled[: tensor.shape[0], : tensor.shape[1]] = tensor
    return filled


def _by_vector(tensor: torch.Tensor, words: ScaleWords) -> torch.Tensor:
    return tensor.view(-1, words.vectors, words.vector).transpose(0, 1)


def _paired(packed: PackedWeight, rows: torch.Tensor) -> torch.Tensor:
    halves = rows.flatten(1)[:, : _num_groups(packed)].contiguous()
    return halves.view(_kept(packed)).to(packed.spec.scale_dtype.torch)


def _alone(packed: PackedWeight, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    groups = rows.flatten(1)[:, : _num_groups(packed)].contiguous()
    if not packed.spec.has_zero_points:
        return groups, None
    scales = (groups >> 16).to(torch.int16).view(packed.spec.scale_dtype.torch)
    return scales, groups.to(torch.uint8)
