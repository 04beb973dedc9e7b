"""vLLM's activations of experts as ours; its kernels' constants are those of its own code."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedq_kernels.activation import PLAIN, Activation


class Options(NamedTuple):
    """What a layer of experts is given beside the name of its activation, None where nothing."""

    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None

    @classmethod
    def of(cls, moe_config: Any) -> "Options":
        return cls(*(getattr(moe_config, name, None) for name in cls._fields))


def _clamped(given: Options) -> Activation:
    return Activation(
        "silu", given.swiglu_limit, given.swiglu_alpha or 1.0, given.swiglu_beta or 0.0
    )


def _situ(given: Options) -> Activation:
    return Activation("situ", given.activation_situ_linear_beta, given.activation_situ_beta or 1.0)


ACTIVATIONS: dict[str, Callable[[Options], Activation]] = {
    "silu": lambda given: Activation("silu", given.swiglu_limit),
    "gelu": lambda given: Activation("gelu"),
    "gelu_tanh": lambda given: Activation("gelu_tanh"),
    "swigluoai_uninterleave": _clamped,
    "swiglustep": lambda given: Activation("swiglustep", 7.0),
    "situ": _situ,
    **{name: lambda given, name=name: Activation(name) for name in PLAIN},
}
"""By the values of vLLM's `MoEActivation`; gpt-oss's interleaves gate and up."""


def activation_of(moe_config: Any) -> Activation | None:
    """What vLLM's layer of experts does between its products; None where it is not known here."""
    made = ACTIVATIONS.get(moe_config.activation.value)
    return None if made is None else made(Options.of(moe_config))
