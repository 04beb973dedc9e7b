"""AWQ checkpoints in AutoAWQ's packings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from builders.truth import Build, Tensors, Truth, pack_along_columns, pack_straddling

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a group of 8 that AutoAWQ puts into nibble 0, 1, ... of a word."""


def awq_tensors(truth: Truth) -> Tensors:
    assert truth.zeros is not None
    return {
        "qweight": pack_along_columns(truth.codes.T, AWQ_COLUMNS),
        "qzeros": pack_along_columns(truth.zeros.T, AWQ_COLUMNS),
        "scales": truth.scales.T.contiguous(),
    }


def padded_groups(values: np.ndarray, group_size: int) -> np.ndarray:
    """`[N, G]` with zeros up to the width that AutoAWQ's gemv kernels read."""
    words = -(-values.shape[1] // 8)
    if group_size == 64:
        words += words % 2
    if group_size == 32:
        words += -words % 4
    return np.pad(values, ((0, 0), (0, 8 * words - values.shape[1])))


def awq_gemv_tensors(truth: Truth) -> Tensors:
    assert truth.zeros is not None
    scales = padded_groups(truth.scales.float().numpy(), truth.group_size)
    return {
        "qweight": pack_along_columns(truth.codes),
        "qzeros": pack_along_columns(padded_groups(truth.zeros, truth.group_size)),
        "scales": torch.from_numpy(scales).to(truth.scales.dtype),
    }


def awq_gemv_fast_tensors(truth: Truth) -> Tensors:
    assert truth.zeros is not None
    n, k = truth.codes.shape
    words = np.zeros((n // 4, k), dtype=np.uint16)
    for row in range(n):
        for column in range(k):
            block, within = divmod(column, 64)
            half, c = divmod(within, 32)
            # Pairs of columns 8 apart come together, then the even ones before the odd ones
            place = 32 * half + 8 * (c % 8 // 2) + 4 * (c % 2) + c // 8
            nibble = 64 * (row % 4) + place
            word = words[row // 4, 64 * block + nibble // 4 : 64 * block + nibble // 4 + 1]
            word |= np.uint16(int(truth.codes[row, column]) << 4 * (nibble % 4))
    scales = padded_groups(truth.scales.float().numpy(), truth.group_size)
    zeros = padded_groups(truth.zeros.astype(np.float32), truth.group_size)
    dtype = truth.scales.dtype
    return {
        "qweight": torch.from_numpy(words.view(np.int16)),
        "qzeros": torch.from_numpy((-scales * zeros).T.copy()).to(dtype),
        "scales": torch.from_numpy(scales.T.copy()).to(dtype),
    }


def streamed_tensors(truth: Truth) -> Tensors:
    """As GPTQModel packs other widths than 4 bits: no order of its own, rows of whole words."""
    assert truth.zeros is not None

    def words(values: np.ndarray) -> torch.Tensor:
        width = -(-values.shape[1] * truth.bits // 32)
        return pack_straddling(np.ascontiguousarray(values), truth.bits)[:, :width].contiguous()

    return {
        "qweight": words(truth.codes.T),
        "qzeros": words(truth.zeros.T),
        "scales": truth.scales.T.contiguous(),
    }


def streamed_config(group_size: int, *, bits: int) -> dict[str, Any]:
    return {**awq_config(group_size), "bits": bits, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}


def awq_config(group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def awq_version(version: str) -> Callable[[int], dict[str, Any]]:
    return lambda group_size: {**awq_config(group_size), "version": version}


BUILDS = {"awq": Build(False, awq_tensors, awq_config)}

WIDTH_BUILDS = {
    f"awq-{bits}bit": Build(False, streamed_tensors, partial(streamed_config, bits=bits), bits=bits)
    for bits in (2, 3, 8)
}

AWQ_BUILDS = {
    "awq-gemv": Build(False, awq_gemv_tensors, awq_version("gemv")),
    "awq-gemv-fast": Build(False, awq_gemv_fast_tensors, awq_version("gemv_fast")),
}
"""AWQ's other packings, which take whole groups of 32, 64 or at least 128 only."""
