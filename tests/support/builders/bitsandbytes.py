"""bitsandbytes from known codes and absmax, block by block of the flat weight.

The codebooks are those that bitsandbytes itself wrote into tests/assets/bnb-packings.safetensors.
"""

import json
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from builders.truth import Tensors, Truth
from tiny_models import ASSETS

PACKINGS = load_file(ASSETS / "bnb-packings.safetensors")
QUANT_MAPS = {
    "nf4": PACKINGS["nf4-nested.weight.quant_map"],
    "fp4": PACKINGS["fp4.weight.quant_map"],
}
NESTED_MAP = PACKINGS["nf4-nested.weight.nested_quant_map"]
# The kernels' codebook of fp4 counts in twelfths, so that its entries are whole sixteenths
UNITS = {"nf4": 1, "fp4": 12}
ENTRIES = {
    "nf4": QUANT_MAPS["nf4"],
    "fp4": (QUANT_MAPS["fp4"] * 12 * 16).round() / 16,
}
OFFSET = 0.25
NESTED_BLOCKSIZE = 32
"""Smaller than bitsandbytes' 256, so that small layers have several nested blocks."""


@dataclass(frozen=True, kw_only=True)
class BnbTruth(Truth):
    """`stored` is what the file holds of each block's absmax; `group_size` divides K."""

    quant_type: str
    blocksize: int
    stored: dict[str, torch.Tensor] = field(repr=False)

    def values(self, n0: int, n1: int, k0: int, k1: int) -> torch.Tensor:
        """What a region is worth, multiplied in fp32."""
        codes = torch.from_numpy(self.codes[n0:n1, k0:k1].astype(np.int64))
        scales = self.scales[n0:n1][:, np.arange(k0, k1) // self.group_size]
        return (ENTRIES[self.quant_type][codes] * scales).double()


@dataclass(frozen=True)
class BnbBuild:
    """A `Build` for bitsandbytes; `group_size` is its blocksize."""

    quant_type: str
    nested: bool
    symmetric: bool = True
    ordered: bool = False
    unit: int = 8

    def truth(
        self, n: int, k: int, group_size: int, seed: int = 0, dtype: object = None
    ) -> BnbTruth:
        rng = np.random.default_rng(seed)
        blocks = -(-n * k // group_size)
        if self.nested:
            stored = {
                "absmax": torch.from_numpy(rng.integers(0, 256, blocks, dtype=np.uint8)),
                "nested_absmax": torch.from_numpy(
                    rng.uniform(0.1, 0.2, -(-blocks // NESTED_BLOCKSIZE)).astype(np.float32)
                ),
                "nested_quant_map": NESTED_MAP.clone(),
            }
            levels = NESTED_MAP.numpy()[stored["absmax"].numpy()]
            factors = np.repeat(stored["nested_absmax"].numpy(), NESTED_BLOCKSIZE)[:blocks]
            absmax = levels * factors + np.float32(OFFSET)
        else:
            absmax = rng.uniform(0.01, 0.02, blocks).astype(np.float32)
            stored = {"absmax": torch.from_numpy(absmax)}
        per_weight = np.repeat(absmax / np.float32(UNITS[self.quant_type]), group_size)
        group = gcd(k, group_size)
        scales = per_weight[: n * k].reshape(n, k)[:, ::group]
        return BnbTruth(
            codes=rng.integers(0, 16, (n, k), dtype=np.uint8),
            zeros=None,
            scales=torch.from_numpy(scales.copy()),
            group_size=group,
            quant_type=self.quant_type,
            blocksize=group_size,
            stored=stored,
        )

    def tensors(self, truth: BnbTruth) -> Tensors:
        flat = truth.codes.reshape(-1)
        packed = torch.from_numpy(flat[0::2] * np.uint8(16) + flat[1::2])
        return {
            "weight": packed[:, None].contiguous(),
            "weight.quant_map": QUANT_MAPS[self.quant_type].clone(),
            f"weight.quant_state.bitsandbytes__{self.quant_type}": packed_state(self.state(truth)),
            **{f"weight.{name}": tensor.clone() for name, tensor in truth.stored.items()},
        }

    def state(self, truth: BnbTruth) -> dict[str, Any]:
        state = {
            "quant_type": self.quant_type,
            "blocksize": truth.blocksize,
            "dtype": "bfloat16",
            "shape": list(truth.codes.shape),
        }
        nested = {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": OFFSET,
        }
        return {**state, **nested} if self.nested else state

    def config(self, group_size: int) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.nested,
            "llm_int8_skip_modules": None,
        }


def packed_state(state: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


BUILDS = {
    "bnb-nf4": BnbBuild("nf4", nested=False),
    "bnb-nf4-nested": BnbBuild("nf4", nested=True),
    "bnb-fp4": BnbBuild("fp4", nested=False),
    "bnb-fp4-nested": BnbBuild("fp4", nested=True),
}
