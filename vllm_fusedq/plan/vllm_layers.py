"""vLLM's layers from a checkpoint's: siblings fused, experts stacked, each cut for a rank."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.errors import Problem
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding, is_lm_head, is_tied
from vllm_fusedq.names import FUSED_LAYERS, expert_module, vllm_layer
from vllm_fusedq.plan.attention import kv_heads
from vllm_fusedq.plan.experts import ExpertSplit, ExpertStack, shard_experts
from vllm_fusedq.plan.model_code import head_order, state_rows
from vllm_fusedq.plan.shards import (
    LayerShard,
    UnevenSplit,
    shard_embedding,
    shard_head,
    shard_module,
    style_of,
)


def shards_of_rank(
    checkpoint: Checkpoint,
    layers: Mapping[str, LayerFormat],
    stacks: Sequence[ExpertStack],
    tp_size: int,
    rank: int,
    split: ExpertSplit,
) -> tuple[list[LayerShard], list[Problem]]:
    """The shards of a rank in the order of `layers`, and what stands against the others.

    `rank` counts data-parallel copies too, tensor-parallel ranks fastest.
    """
    by_name = {stack.name: stack for stack in stacks}
    groups: dict[str, list[tuple[str, str | int | None]]] = defaultdict(list)
    for module in layers:
        prefix, shard_id = vllm_layer(module)
        if prefix in by_name or expert_module(module) is None:
            groups[prefix].append((module, shard_id))
    shards, problems = [], []
    for prefix, members in groups.items():
        try:
            if stack := by_name.get(prefix):
                shards += shard_experts(stack, tp_size, rank, split)
            else:
                dense = _dense_shard(checkpoint, layers, prefix, members, tp_size, rank % tp_size)
                shards.append(dense)
        except UnevenSplit as error:
            fix = "choose another --tensor-parallel-size"
            supported = "tensor-parallel sizes that divide the layer evenly"
            problems.append(Problem(prefix, str(error), supported, fix))
    return shards, problems


def _dense_shard(
    checkpoint: Checkpoint,
    layers: Mapping[str, LayerFormat],
    prefix: str,
    members: list[tuple[str, str | int | None]],
    tp: int,
    rank: int,
) -> LayerShard:
    # vLLM replicates them where ranks outnumber them
    heads = kv_heads(checkpoint)
    first = members[0][0]
    style, n, k = style_of(first), layers[first].n, layers[first].k
    if is_lm_head(prefix):
        return shard_head(prefix, n, k, tp, rank)
    if is_input_embedding(prefix):
        return shard_embedding(prefix, n, k, tp, rank, is_tied(checkpoint))
    if order := head_order(checkpoint, first, n) or state_rows(checkpoint, first, n):
        return LayerShard(prefix, style, tp, order.shard(first, k, tp, rank))
    sizes = {module: (layers[module].n, layers[module].k) for module, _ in members}
    sizes |= _fused_though_plain(checkpoint, prefix, sizes)
    parts = tuple(
        shard_module(module, sid, *sizes[module], style, tp, rank, heads)
        for module, sid in _in_fused_order([(module, vllm_layer(module)[1]) for module in sizes])
    )
    return LayerShard(prefix, style, tp, parts)


def _fused_though_plain(
    checkpoint: Checkpoint, prefix: str, quantized: Collection[str]
) -> dict[str, tuple[int, int]]:
    """N and K of the unquantized matrices that vLLM fuses with the quantized ones of a layer."""
    parent, _, name = prefix.rpartition(".")
    stored = checkpoint.modules()
    found = {}
    for part, _ in FUSED_LAYERS.get(name, ()):
        module = f"{parent}.{part}" if parent else part
        weight = stored.get(module, {}).get("weight")
        if module not in quantized and weight is not None and len(weight.shape) == 2:
            found[module] = weight.shape
    return found


def _in_fused_order(
    members: list[tuple[str, str | int | None]],
) -> list[tuple[str, str | int | None]]:
    order = [shard_id for parts in FUSED_LAYERS.values() for _, shard_id in parts]
    return sorted(members, key=lambda member: order.index(member[1]) if member[1] in order else 0)
