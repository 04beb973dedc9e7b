"""GPTQ checkpoints, both checkpoint_formats."""

from functools import partial
from typing import Any

import numpy as np
import torch

from builders.truth import (
    Build,
    Tensors,
    Truth,
    pack_along_columns,
    pack_straddling,
)


def gptq_words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """`[R, C]` to int32 `[R, W]`."""
    return pack_straddling(codes, bits) if 32 % bits else pack_along_columns(codes, bits=bits)


def gptq_tensors(truth: Truth, *, stored_minus_one: bool = True, g_idx: bool = True) -> Tensors:
    n, k = truth.codes.shape
    zeros = truth.zeros
    if zeros is None:
        zeros = np.full((n, truth.scales.shape[1]), truth.half, dtype=np.uint8)
    tensors = {
        "qweight": gptq_words(np.ascontiguousarray(truth.codes), truth.bits).T.contiguous(),
        "qzeros": gptq_words(
            np.ascontiguousarray(zeros.T) - np.uint8(stored_minus_one), truth.bits
        ),
        "scales": truth.scales.T.contiguous(),
    }
    if truth.g_idx is not None:
        tensors["g_idx"] = torch.from_numpy(truth.g_idx.astype(np.int32))
    elif g_idx:
        tensors["g_idx"] = torch.tensor([i // truth.group_size for i in range(k)]).int()
    return tensors


def gptq_config(
    group_size: int,
    *,
    sym: bool = True,
    version: str = "gptq",
    desc_act: bool = False,
    bits: int = 4,
) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": version,
        "lm_head": False,
    }


def unit(bits: int) -> int:
    """How many codes make whole words."""
    return 32 if 32 % bits else max(8, 32 // bits)


def v1(bits: int = 4, *, sym: bool, **config: Any) -> Build:
    return Build(
        sym,
        gptq_tensors,
        partial(gptq_config, sym=sym, bits=bits, **config),
        zero_range=(1, 2**bits - 1),
        ordered=config.get("desc_act", False),
        bits=bits,
        unit=unit(bits),
    )


def v2(bits: int = 4, *, sym: bool, g_idx: bool = True, **config: Any) -> Build:
    return Build(
        sym,
        partial(gptq_tensors, stored_minus_one=False, g_idx=g_idx),
        partial(gptq_config, sym=sym, bits=bits, version="gptq_v2", **config),
        ordered=config.get("desc_act", False),
        bits=bits,
        unit=unit(bits),
    )


BUILDS = {
    "gptq-sym": v1(sym=True),
    "gptq-sym-v2": v2(sym=True, g_idx=False),
    "gptq-asym": v1(sym=False),
    "gptq-asym-v2": v2(sym=False),
}

WIDTH_BUILDS = {
    f"gptq-{bits}bit-{kind}": build
    for bits in (2, 3, 8)
    for kind, build in {
        "sym": v1(bits, sym=True),
        "asym": v1(bits, sym=False),
        "asym-v2": v2(bits, sym=False),
    }.items()
}

ORDERED_BUILDS = {
    "gptq-sym-order": v1(sym=True, desc_act=True),
    "gptq-asym-order": v2(sym=False, desc_act=True),
    "gptq-3bit-sym-order": v1(3, sym=True, desc_act=True),
    "gptq-8bit-asym-order": v1(8, sym=False, desc_act=True),
}
