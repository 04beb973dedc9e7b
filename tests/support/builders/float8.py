"""Linears with 8-bit floats (E4M3) and one scale for all, each row or each block, by any tool."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from builders.truth import Tensors, Truth

# Divides few sizes: the last block of a weight, and those at the borders of ranks, are cut
ROWS = 24


@dataclass(frozen=True, kw_only=True)
class FloatTruth(Truth):
    """`stored` is what the file holds of the scales."""

    stored: torch.Tensor

    def values(self, n0: int, n1: int, k0: int, k1: int) -> torch.Tensor:
        """What a region is worth, multiplied in fp32: exact for scales in 16 bits."""
        numbers = torch.from_numpy(self.codes[n0:n1, k0:k1].copy()).view(torch.float8_e4m3fn)
        scales = self.scales[n0:n1][:, np.arange(self.codes.shape[1])[k0:k1] // self.group_size]
        return (numbers.float() * scales.float()).double()

    def slice(self, n0: int, n1: int, k0: int, k1: int) -> tuple[torch.Tensor, None, torch.Tensor]:
        groups = slice(k0 // self.group_size, -(-k1 // self.group_size))
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].copy())
        return codes, None, self.scales[n0:n1, groups].contiguous()


@dataclass(frozen=True)
class FloatBuild:
    """A `Build` whose scales are of a `shape`: "tensor", "channel" or "block"; `scale` names them.

    A `block` of 0 columns has a group's. `more` tensors lie beside. Scales of float8_e8m0fnu are
    powers of two, with `as_bytes` stored as uint8.
    """

    shape: str
    config_of: Callable[[str, int], dict[str, Any]]
    scale: str = "weight_scale"
    scale_dims: int = 1
    scale_dtype: torch.dtype | None = None
    block: tuple[int, int] = (ROWS, 0)
    more: tuple[str, ...] = ()
    as_bytes: bool = False
    symmetric: bool = True
    ordered: bool = False
    bits: int = 8
    unit: int = 8

    def truth(
        self, n: int, k: int, group_size: int, seed: int = 0, dtype: torch.dtype = torch.float16
    ) -> FloatTruth:
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
        codes[codes & 127 == 127] = 0x80
        rows, group = self.block_of(n, k, group_size)
        grid = rng.uniform(0.01, 0.02, (-(-n // rows), -(-k // group)))
        return self.truth_of(codes, torch.from_numpy(grid).to(self.scale_dtype or dtype), group)

    def quantized(self, weight: torch.Tensor, group_size: int) -> FloatTruth:
        """A real weight `[N, K]`, rounded to the nearest number that its block's scale allows."""
        (n, k), weight = weight.shape, weight.float()
        rows, group = self.block_of(n, k, group_size)
        padded = torch.nn.functional.pad(weight, (0, -k % group, 0, -n % rows))
        blocks = padded.view(-(-n // rows), rows, -1, group)
        grid = (blocks.abs().amax((1, 3)) / 448).to(self.scale_dtype or torch.bfloat16)
        numbers = (blocks / grid.float()[:, None, :, None]).clamp(-448, 448)
        codes = numbers.view(padded.shape)[:n, :k].to(torch.float8_e4m3fn).view(torch.uint8)
        return self.truth_of(codes.numpy(), grid, group)

    def block_of(self, n: int, k: int, group_size: int) -> tuple[int, int]:
        """The out_features and in_features that share a scale."""
        columns = self.block[1] or group_size
        group = columns if self.shape == "block" and columns != -1 else k
        return {"tensor": n, "channel": 1, "block": self.block[0]}[self.shape], group

    def truth_of(self, codes: np.ndarray, grid: torch.Tensor, group: int) -> FloatTruth:
        rows = self.block_of(*codes.shape, group)[0]
        numbers = grid.to(torch.bfloat16) if grid.itemsize == 1 else grid
        scales = numbers.repeat_interleave(rows, 0)[: len(codes)].contiguous()
        if self.scale_dims == 4:
            grid = grid[:, None, :, None]
        if self.shape != "block":
            grid = grid.reshape([-1, *[1] * (self.scale_dims - 1)] if self.scale_dims else [])
        return FloatTruth(
            codes=codes, zeros=None, scales=scales, group_size=group, bits=8, stored=grid
        )

    def tensors(self, truth: FloatTruth) -> Tensors:
        return {
            "weight": torch.from_numpy(truth.codes.copy()).view(torch.float8_e4m3fn),
            self.scale: truth.stored.view(torch.uint8) if self.as_bytes else truth.stored.clone(),
            **{name: torch.tensor(0.5) for name in self.more},
        }

    def config(self, group_size: int) -> dict[str, Any]:
        return self.config_of(self.shape, group_size)


def compressed_tensors(shape: str, group_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": shape,
        "dynamic": False,
    }
    if shape == "block":
        weights["block_structure"] = [ROWS, group_size]
    activations = {"input_activations": None, "output_activations": None}
    group = {"targets": ["Linear"], "weights": weights, **activations}
    return {
        "quant_method": "compressed-tensors",
        # What the package writes where activations stay as they are
        "format": "float-quantized" if shape == "block" else "naive-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "version": "0.17.1",
    }


def compressed_tensors_mxfp8(shape: str, group_size: int) -> dict[str, Any]:
    config = compressed_tensors("group", group_size)
    weights = config["config_groups"]["group_0"]["weights"]
    weights |= {"group_size": 32, "scale_dtype": "torch.uint8"}
    return config | {"format": "mxfp8-quantized"}


def modelopt_mxfp8(shape: str, group_size: int) -> dict[str, Any]:
    return modelopt("tensor", group_size) | {"quant_algo": "MXFP8"}


def fp8(shape: str, group_size: int) -> dict[str, Any]:
    block = {"weight_block_size": [ROWS, group_size]} if shape == "block" else {}
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **block}


def fbgemm_fp8(shape: str, group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head"],
    }


def modelopt(shape: str, group_size: int) -> dict[str, Any]:
    algorithms = {
        "tensor": "FP8",
        "channel": "FP8_PER_CHANNEL_PER_TOKEN",
        "block": "FP8_PB_WO",
    }
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithms[shape],
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.44.0"},
    }


E8M0 = torch.float8_e8m0fnu
MXFP8: dict[str, Any] = {"scale_dtype": E8M0, "as_bytes": True, "block": (1, 32)}
BUILDS = {
    "ct-float-tensor": FloatBuild("tensor", compressed_tensors),
    "ct-float-channel": FloatBuild("channel", compressed_tensors, scale_dims=2),
    "ct-float-block": FloatBuild("block", compressed_tensors),
    "fp8-tensor": FloatBuild("tensor", fp8, scale_dims=0, more=("input_scale",)),
    "fp8-block": FloatBuild("block", fp8, scale="weight_scale_inv", scale_dtype=torch.float32),
    "fbgemm-fp8": FloatBuild("channel", fbgemm_fp8, scale_dims=2, scale_dtype=torch.float32),
    "modelopt-fp8": FloatBuild(
        "tensor", modelopt, scale_dims=0, scale_dtype=torch.float32, more=("input_scale",)
    ),
    "modelopt-fp8-channel": FloatBuild("channel", modelopt, scale_dtype=torch.float32),
    "modelopt-fp8-block": FloatBuild(
        "block", modelopt, scale_dims=4, scale_dtype=torch.float32, block=(128, 128)
    ),
    "ct-mxfp8": FloatBuild("block", compressed_tensors_mxfp8, **MXFP8),
    "modelopt-mxfp8": FloatBuild("block", modelopt_mxfp8, **MXFP8),
    "fp8-block-e8m0": FloatBuild("block", fp8, scale="weight_scale_inv", scale_dtype=E8M0),
}
