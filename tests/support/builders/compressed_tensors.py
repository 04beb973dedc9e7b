"""compressed-tensors checkpoints, pack-quantized and int-quantized."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from builders.truth import Build, Tensors, Truth, pack_along_columns, pack_straddling


def stream(codes: np.ndarray, bits: int) -> torch.Tensor:
    """`[R, C]` to int32 `[R, ceil(C / 32 * bits)]`, no bit unused but in the last word."""
    return pack_straddling(codes, bits)[:, : -(-codes.shape[1] * bits // 32)].contiguous()


def padded(codes: np.ndarray, bits: int) -> torch.Tensor:
    """`[R, C]` to int32 `[R, ceil(C / P)]` of P whole codes, as before version 0.18."""
    return pack_along_columns(codes, bits=bits)


def pack_quantized_tensors(
    truth: Truth, words: Callable[[np.ndarray, int], torch.Tensor] = stream
) -> Tensors:
    tensors = {
        "weight_packed": words(truth.codes, truth.bits),
        "weight_scale": truth.scales.clone(),
        "weight_shape": torch.tensor(truth.codes.shape),
    }
    if truth.zeros is not None:
        zeros = np.ascontiguousarray(truth.zeros.T)
        tensors["weight_zero_point"] = words(zeros, truth.bits).T.contiguous()
    return tensors | order_of(truth)


def int_quantized_tensors(truth: Truth) -> Tensors:
    tensors = {"weight": signed(truth.codes, truth), "weight_scale": truth.scales.clone()}
    if truth.zeros is not None:
        tensors["weight_zero_point"] = signed(truth.zeros, truth)
    return tensors | order_of(truth)


def signed(codes: np.ndarray, truth: Truth) -> torch.Tensor:
    return torch.from_numpy((codes.astype(np.int16) - truth.half).astype(np.int8))


def order_of(truth: Truth) -> Tensors:
    if truth.g_idx is None:
        return {}
    return {"weight_g_idx": torch.from_numpy(truth.g_idx.astype(np.int32))}


TENSORS = {"pack-quantized": pack_quantized_tensors, "int-quantized": int_quantized_tensors}
STREAMING, PADDING = "0.18.0", "0.17.1"


def compressed_tensors_config(
    group_size: int,
    *,
    symmetric: bool = True,
    actorder: str | None = None,
    bits: int = 4,
    packing: str = "pack-quantized",
    version: str = STREAMING,
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": actorder,
        "dynamic": False,
    }
    activations = {"input_activations": None, "output_activations": None}
    group = {"targets": ["Linear"], "weights": weights, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "version": version,
    }


def build(
    bits: int = 4,
    *,
    symmetric: bool,
    packing: str = "pack-quantized",
    actorder: str | None = None,
    version: str = STREAMING,
) -> Build:
    options = {"symmetric": symmetric, "packing": packing, "actorder": actorder, "bits": bits}
    options["version"] = version
    tensors = TENSORS[packing]
    return Build(
        symmetric,
        partial(tensors, words=padded) if version == PADDING else tensors,
        partial(compressed_tensors_config, **options),
        ordered=actorder is not None,
        bits=bits,
    )


BUILDS = {"ct-sym": build(symmetric=True), "ct-asym": build(symmetric=False)}

WIDTH_BUILDS = (
    {
        f"ct-{bits}bit-{'sym' if symmetric else 'asym'}": build(bits, symmetric=symmetric)
        for bits in (2, 3, 5, 6, 7, 8)
        for symmetric in (True, False)
    }
    | {
        f"ct-{bits}bit-padded-{'sym' if symmetric else 'asym'}": build(
            bits, symmetric=symmetric, version=PADDING
        )
        for bits in (3, 5, 6, 7)
        for symmetric in (True, False)
    }
    | {
        f"ct-int{bits}-{'sym' if symmetric else 'asym'}": build(
            bits, symmetric=symmetric, packing="int-quantized"
        )
        for bits in (4, 8)
        for symmetric in (True, False)
    }
)

ORDERED_BUILDS = {
    "ct-sym-order": build(symmetric=True, actorder="group"),
    "ct-asym-order": build(symmetric=False, actorder="dynamic"),
    "ct-6bit-asym-order": build(6, symmetric=False, actorder="group"),
    "ct-int8-sym-order": build(8, symmetric=True, packing="int-quantized", actorder="group"),
}
