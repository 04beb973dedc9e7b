"""AutoRound checkpoints: GPTQ's tensors or AWQ's under AutoRound's config."""

from functools import partial
from typing import Any

import numpy as np
import torch

from builders.awq import AWQ_COLUMNS, awq_tensors
from builders.gptq import gptq_tensors, unit
from builders.truth import Build, Tensors, Truth, pack_straddling


def interleaved_tensors(truth: Truth) -> Tensors:
    """AWQ's gemm with 5 to 7 bits: one stream of bits per row, each eight in AutoAWQ's order."""
    assert truth.zeros is not None

    def words(values: np.ndarray) -> torch.Tensor:
        rows, width = values.shape
        eights = values.reshape(rows, width // 8, 8)[:, :, AWQ_COLUMNS]
        return pack_straddling(np.ascontiguousarray(eights.reshape(rows, width)), truth.bits)

    return {
        "qweight": words(truth.codes.T),
        "qzeros": words(truth.zeros.T),
        "scales": truth.scales.T.contiguous(),
    }


def autoround_config(
    group_size: int, *, sym: bool, bits: int = 4, packing: str = "auto_round:auto_gptq"
) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "autoround_version": "0.16.1",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "data_type": "int",
        "packing_format": packing,
    }


def minus_one(bits: int = 4, *, sym: bool) -> Build:
    return Build(
        sym,
        partial(gptq_tensors, g_idx=False),
        partial(autoround_config, sym=sym, bits=bits),
        zero_range=(1, 2**bits - 1),
        bits=bits,
        unit=unit(bits),
    )


def as_they_are(bits: int = 4, *, sym: bool, packing: str = "auto_round") -> Build:
    g_idx = packing == "auto_round:gptqmodel"
    return Build(
        sym,
        partial(gptq_tensors, stored_minus_one=False, g_idx=g_idx),
        partial(autoround_config, sym=sym, bits=bits, packing=packing),
        bits=bits,
        unit=unit(bits),
    )


def like_awq(bits: int = 4) -> Build:
    return Build(
        False,
        awq_tensors if bits == 4 else interleaved_tensors,
        partial(autoround_config, sym=False, bits=bits, packing="auto_round:auto_awq"),
        bits=bits,
        unit=8 if bits == 4 else 32,
    )


BUILDS = {
    "autoround-sym": minus_one(sym=True),
    "autoround-asym": as_they_are(sym=False),
    "autoround-gptqmodel": as_they_are(sym=False, packing="auto_round:gptqmodel"),
    "autoround-awq": like_awq(),
}

WIDTH_BUILDS = {
    **{f"autoround-{bits}bit-sym": minus_one(bits, sym=True) for bits in (2, 3, 5, 6, 7, 8)},
    **{f"autoround-{bits}bit-asym": as_they_are(bits, sym=False) for bits in (2, 3, 5, 6, 7, 8)},
    **{f"autoround-{bits}bit-minus-one": minus_one(bits, sym=False) for bits in (3, 4, 5, 7)},
    **{f"autoround-{bits}bit-awq": like_awq(bits) for bits in (5, 6, 7)},
}
