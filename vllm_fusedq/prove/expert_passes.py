"""Compares whole passes of a layer's experts with plain PyTorch, with every activation there is.

A checkpoint does not say what its experts do between their products: vLLM's model does.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fusedq_kernels import experts, guard_experts
from fusedq_kernels.activation import PLAIN, SILU, Activation
from fusedq_kernels.guard_experts import Choices, Truth
from vllm_fusedq.prove.launches import LoadedExperts

# With constants as vLLM's models have them: gpt-oss's silu, Kimi's situ
GATED = (
    SILU,
    Activation("silu", 7.0, 1.702, 1.0),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("swiglustep", 7.0),
    Activation("situ", 2.0, 1.5),
)
UNGATED = tuple(Activation(name) for name in PLAIN)


def with_each_activation(layer: LoadedExperts) -> Iterator[LoadedExperts]:
    """The layer with each activation that experts like it may have, the usual one first."""
    resident = layer.resident
    for activation in GATED if resident.call.activation.is_gated else UNGATED:
        call = replace(resident.call, activation=activation)
        yield replace(layer, resident=replace(resident, call=call))


def wrong_pass(layer: LoadedExperts, chosen: Choices) -> str:
    """How one pass on a CPU is wrong, of tokens that choose so; empty where it is not.

    Within what rounding explains, of scaled weights too.
    """
    resident, routing = layer.resident, (chosen.weights, chosen.ids, chosen.places)
    known = Truth.of(resident, chosen)
    expected = known.sums.sums
    found = experts.experts(known.x, *routing, resident.w13, resident.w2, resident.call).double()
    allowed = guard_experts.allowance(resident, known, found.numel(), (True, True))
    excess = ((found - expected).abs() / allowed).nan_to_num(nan=torch.inf)
    if (wrong := int((excess > 1).sum())) == 0:
        return ""
    token, output = divmod(int(excess.argmax()), found.shape[1])
    return (
        f"{layer}: found {wrong} of {found.numel()} outputs wrong with {resident.call.activation} "
        f"between the products (the worst: token {token}, output {output}, "
        f"{found[token, output]:.4g} in place of {expected[token, output]:.4g}); supported: what "
        "plain PyTorch computes in float64, within rounding; serve without --quantization fusedq, "
        "and report this message"
    )
