"""Checkpoints as AMD Quark exports them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from builders.float4 import Float4Build, Float4Truth, packed
from builders.float8 import ROWS, FloatBuild
from builders.truth import Build, Tensors, Truth

REORDERED = (0, 2, 4, 6, 1, 3, 5, 7)
"""The out_feature of a group of 8 that goes into nibble 0, 1, ... of a word."""


def words(values: np.ndarray, columns: tuple[int, ...]) -> torch.Tensor:
    """`[R, 8 * W]` of integers, signed or not, to int32 `[R, W]`."""
    nibbles = (values.astype(np.int64) & 15).reshape(len(values), -1, 8)[:, :, list(columns)]
    packed = (nibbles << (4 * np.arange(8))).sum(axis=2)
    return torch.from_numpy(packed.astype(np.uint32, order="C").view(np.int32))


@dataclass(frozen=True)
class IntFlavour:
    """`dtype` int4 or uint4, packed by `pack_method`; zero points are stored in any case."""

    dtype: str
    symmetric: bool
    pack_method: str

    def tensors(self, truth: Truth) -> Tensors:
        columns = REORDERED if self.pack_method == "reorder" else tuple(range(8))
        zeros = np.full(truth.scales.shape, 8) if truth.zeros is None else truth.zeros
        less = 8 if self.dtype == "int4" else 0
        return {
            "weight": words(truth.codes.T.astype(int) - less, columns),
            "weight_scale": truth.scales.T.contiguous(),
            "weight_zero_point": words(zeros.T.astype(int) - less, columns),
        }

    def config(self, group_size: int) -> dict[str, Any]:
        weight = {**tensor_config(self.dtype, "per_group"), "group_size": group_size}
        return quark_config({**weight, "symmetric": self.symmetric}, pack_method=self.pack_method)


def tensor_config(dtype: str, qscheme: str) -> dict[str, Any]:
    """What Quark writes of one tensor, the entries that matter for one kind left at null."""
    return {
        "dtype": dtype,
        "is_dynamic": False,
        "qscheme": qscheme,
        "ch_axis": {"per_group": -1, "per_channel": 0}.get(qscheme),
        "group_size": None,
        "symmetric": None,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerGroupMinMaxObserver",
        "is_scale_quant": False,
    }


def layer_config(
    weight: dict[str, Any] | None, inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "input_tensors": inputs,
        "output_tensors": None,
        "weight": weight,
        "bias": None,
        "target_device": None,
    }


def quark_config(
    weight: dict[str, Any], inputs: dict[str, Any] | None = None, pack_method: str = "reorder"
) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "global_quant_config": layer_config(weight, inputs),
        "exclude": ["lm_head"],
        "algo_config": None,
        "softmax_quant_spec": None,
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "kv_cache_quant_config": {},
        "quant_mode": "eager_mode",
        "version": "0.12",
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": pack_method,
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


FLAVOURS = {
    "quark-sym": IntFlavour("int4", True, "reorder"),
    "quark-asym": IntFlavour("uint4", False, "order"),
    "quark-signed": IntFlavour("int4", False, "reorder"),
}

BUILDS = {
    name: Build(FLAVOURS[name].symmetric, FLAVOURS[name].tensors, FLAVOURS[name].config)
    for name in ("quark-sym", "quark-asym")
}
"""Groups have a size: none is per channel."""


def floats(qscheme: str, group_size: int) -> dict[str, Any]:
    """W8A8, as Quark quantizes to 8-bit floats."""
    inputs = tensor_config("fp8_e4m3", "per_tensor")
    block = {"block_size": [ROWS, group_size]} if qscheme == "block" else {}
    return quark_config({**tensor_config("fp8_e4m3", f"per_{qscheme}"), **block}, inputs)


def mxfp4_config() -> dict[str, Any]:
    weight = tensor_config("fp4", "per_group")
    return quark_config({**weight, "group_size": 32, "scale_format": "e8m0"})


def mxfp4_tensors(truth: Float4Truth) -> Tensors:
    scales = truth.scales.view(torch.uint8).clone()
    return {"weight": packed(truth), "weight_scale": scales}


FLOAT4_BUILDS = {"quark-mxfp4": Float4Build(32, mxfp4_tensors, mxfp4_config)}

FLOAT8 = {
    "quark-fp8": FloatBuild("tensor", floats, scale_dims=0, more=("input_scale",)),
    "quark-fp8-channel": FloatBuild("channel", floats, scale_dtype=torch.float32),
    "quark-fp8-block": FloatBuild("block", floats, scale_dtype=torch.float32),
}
FLOAT_BUILDS = {"quark-fp8": FLOAT8["quark-fp8"]}
