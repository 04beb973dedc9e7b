"""How the fused kernel meets the tokens of experts: constants beside a tile's, and tables.

A slot is `token * top_k + choice`; its position is where it stands among slots sorted by expert.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedq_kernels.activation import Activation

_NO_ACTIVATION = dict.fromkeys(("ACTIVATION", "LIMIT", "ALPHA", "BETA"))


@dataclass(frozen=True, slots=True)
class Routed:
    """Where rows of x and y come from and go to; `gemm_kernel.py` explains each.

    `top_k` is 0 for a weight without experts, and 1 wherever it does not matter, so that launches
    of many models are one binary.
    """

    top_k: int = 0
    alone: bool = False
    x_sorted: bool = False
    y_sorted: bool = False
    activation: Activation | None = None

    def constants(self) -> dict[str, object]:
        """The constexpr arguments of `fused_gemm_kernel`."""
        activation = self.activation
        return {
            "TOP_K": self.top_k,
            "ALONE": self.alone,
            "X_SORTED": self.x_sorted,
            "Y_SORTED": self.y_sorted,
            **_NO_ACTIVATION,
            **(
                {}
                if activation is None
                else {
                    "ACTIVATION": activation.name,
                    "LIMIT": activation.limit,
                    "ALPHA": activation.alpha,
                    "BETA": activation.beta,
                }
            ),
        }


UNROUTED = Routed()


class Routing(NamedTuple):
    """`slots` int32 `[blocks * block_m]`: the slot at each position, the number of slots where
    there is none; None where slot i is alone in block i. `experts` int32 `[blocks]`: the expert of
    each block by its place on this rank, -1 for none."""

    slots: torch.Tensor | None
    experts: torch.Tensor

    @property
    def blocks(self) -> int:
        return len(self.experts)
