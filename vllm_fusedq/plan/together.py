"""The two weights of a layer of experts run together: what is launched for one depends on both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from fusedq_kernels.call import Stacks
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.plan.experts import TOP_K, W13, WEIGHTS
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.uses import Together


def join_experts(plans: Iterable[LayerPlan]) -> list[LayerPlan]:
    """The same plans, those of experts with the launches and the memory of both weights.

    Raises:
        PreflightError: launches depend on how many experts a token asks, and nothing says it.
    """
    found = list(plans)
    layers: dict[str, dict[str, LayerPlan]] = defaultdict(dict)
    for plan in found:
        if plan.experts is not None:
            layers[plan.prefix][plan.shard.weight] = plan
    return [
        _joined(plan, layers[plan.prefix])
        if plan.experts is not None and len(layers[plan.prefix]) == len(WEIGHTS)
        else plan
        for plan in found
    ]


def _joined(plan: LayerPlan, layer: dict[str, LayerPlan]) -> LayerPlan:
    shard = plan.shard
    if not shard.top_k and plan.main.kernel.experts_launch is not None:
        raise PreflightError.single(
            layer=plan.prefix,
            found="experts of which nothing says how many a token asks",
            supported=f"a config.json with {', '.join(TOP_K)}",
            fix=f'add "{TOP_K[0]}" to config.json, with the number that the model was trained for',
        )
    up, down = (layer[weight] for weight in WEIGHTS)
    together = Together(
        stacks=Stacks(shard.count, up.main.call, down.main.call),
        is_up=shard.weight == W13,
        top_k=shard.top_k,
        all_experts=shard.all_experts,
        ordered=(up.ordered, down.ordered),
    )
    return replace(plan, uses=(plan.main.joined(together),))
