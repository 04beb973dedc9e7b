"""E2M1 weights in groups of 16 (NVFP4) and 32 (MXFP4), as each tool stores them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from builders.truth import Tensors, Truth

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*SIZES, *(-size for size in SIZES)], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Float4Truth(Truth):
    """`scale_of_all` is the one of the tensor, where it has one."""

    scale_of_all: float | None

    def values(self, n0: int, n1: int, k0: int, k1: int) -> torch.Tensor:
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].astype(np.int64))
        # A region may be larger than the layer, where a test exchanged tensors
        group_of = np.arange(self.codes.shape[1])[k0:k1] // self.group_size
        scales = self.scales[n0:n1].double()[:, group_of]
        return VALUES[codes] * scales * (self.scale_of_all or 1.0)

    def slice(self, n0: int, n1: int, k0: int, k1: int) -> tuple[torch.Tensor, None, torch.Tensor]:
        groups = slice(k0 // self.group_size, -(-k1 // self.group_size))
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].copy())
        return codes, None, self.scales[n0:n1, groups].contiguous()


@dataclass(frozen=True)
class Float4Build:
    """One flavour; its groups have one size, whatever a test asks for.

    A scale of all is a power of two, whose reciprocal is exact.
    """

    group: int
    stored: Callable[[Float4Truth], Tensors]
    config_of: Callable[[], dict[str, Any]]
    bits: int = 4
    symmetric: bool = True
    ordered: bool = False
    unit: int = 16

    def truth(
        self, n: int, k: int, group_size: int, seed: int = 0, dtype: object = None
    ) -> Float4Truth:
        rng = np.random.default_rng(seed)
        grouped = (n, -(-k // self.group))
        if self.group == 16:
            # Subnormal ones too, up to 448
            scales = torch.from_numpy(rng.integers(1, 127, grouped, dtype=np.uint8))
            scales = scales.view(torch.float8_e4m3fn)
        else:
            scales = torch.from_numpy(rng.integers(117, 124, grouped, dtype=np.uint8))
            scales = scales.view(torch.float8_e8m0fnu)
        return Float4Truth(
            codes=rng.integers(0, 16, (n, k), dtype=np.uint8),
            zeros=None,
            scales=scales,
            group_size=self.group,
            scale_of_all=2.0 ** -(12 + seed % 3) if self.group == 16 else None,
        )

    def tensors(self, truth: Float4Truth) -> Tensors:
        return self.stored(truth)

    def config(self, group_size: int) -> dict[str, Any]:
        return self.config_of()


def packed(truth: Float4Truth) -> torch.Tensor:
    """uint8 `[N, K / 2]`, the even in_feature in the low nibble."""
    even, odd = truth.codes[:, 0::2], truth.codes[:, 1::2]
    return torch.from_numpy(even | odd << np.uint8(4))


def ct_nvfp4(truth: Float4Truth) -> Tensors:
    divisor = torch.tensor([1 / truth.scale_of_all], dtype=torch.float32)
    return {
        "weight_packed": packed(truth),
        "weight_scale": truth.scales.clone(),
        "weight_global_scale": divisor,
    }


def ct_mxfp4(truth: Float4Truth) -> Tensors:
    return {"weight_packed": packed(truth), "weight_scale": truth.scales.view(torch.uint8).clone()}


def ct_config(packing: str, strategy: str, group: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def modelopt_nvfp4(truth: Float4Truth) -> Tensors:
    return {
        "weight": packed(truth),
        "weight_scale": truth.scales.clone(),
        "weight_scale_2": torch.tensor(truth.scale_of_all, dtype=torch.float32),
    }


def modelopt_config() -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.44.0"},
    }


BUILDS = {
    "ct-nvfp4": Float4Build(
        16, ct_nvfp4, lambda: ct_config("nvfp4-pack-quantized", "tensor_group", 16)
    ),
    "ct-mxfp4": Float4Build(32, ct_mxfp4, lambda: ct_config("mxfp4-pack-quantized", "group", 32)),
    "modelopt-nvfp4": Float4Build(16, modelopt_nvfp4, modelopt_config),
}
