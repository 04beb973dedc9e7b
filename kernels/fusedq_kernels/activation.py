"""What an expert does between its two products, as plain data under vLLM's names."""

from dataclasses import dataclass

_GATED = ("silu", "gelu", "gelu_tanh", "swiglustep", "situ")
PLAIN = ("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul")
"""Those of one number."""
ACTIVATIONS = _GATED + PLAIN


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of one number g, or of a pair (g, u) of a gate and an up projection.

    | name | value |
    |---|---|
    | silu | `g * sigmoid(alpha * g) * (u + beta)` |
    | gelu, gelu_tanh | `gelu(g) * u` |
    | swiglustep | `min(silu(g), limit) * u` |
    | situ | `alpha * tanh(g / alpha) * sigmoid(g) * (limit * tanh(u / limit))` |
    | silu_no_mul, gelu_no_mul, gelu_tanh_no_mul | `silu(g)`, `gelu(g)` |
    | relu2_no_mul | `max(g, 0) ** 2` |

    With a `limit`, silu first clamps g to at most `limit`, and it and swiglustep u to within
    `limit` of zero; situ without one takes u as it is. vLLM's swigluoai is silu with limit 7,
    alpha 1.702 and beta 1. Raises ValueError for another name.
    """

    name: str
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.name}")
        if self.name == "swiglustep" and self.limit is None:
            raise ValueError("activation swiglustep needs a limit, got none")

    @property
    def is_gated(self) -> bool:
        """Whether it takes pairs."""
        return self.name in _GATED


SILU = Activation("silu")
