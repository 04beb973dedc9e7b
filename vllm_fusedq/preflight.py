"""Whole-checkpoint planning from headers alone: every layer, every problem, before any weight.

Used by `fusedq check` and by the vLLM configuration hook in the API process.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_fusedq.checkpoint import Checkpoint
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats import format_for
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.embeddings import is_input_embedding, is_lm_head, is_tied
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.plan import LayerPlan, Target, merge_problems, plan_layer
from vllm_fusedq.sharding import (
    FUSED_LAYERS,
    LayerShard,
    UnevenSplit,
    shard_embedding,
    shard_head,
    shard_module,
    style_of,
)

_FUSED_NAMES = {name: (fused, sid) for fused, parts in FUSED_LAYERS.items() for name, sid in parts}

TP_CANDIDATES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What will run where: every quantized layer of one rank, and what stays unquantized."""

    tp_size: int
    layers: tuple[LayerPlan, ...]
    unquantized: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """A ModelPlan as far as it goes: the layers of one rank that run fused, and what stands
    against the others. Without problems it is the plan."""

    plan: ModelPlan
    problems: tuple[Problem, ...]


def survey_model(
    checkpoint: Checkpoint, target: Target, tp_size: int = 1, ranks: Iterable[int] | None = None
) -> Survey:
    """Plan every quantized layer for `tp_size` ranks, and name every reason against one.

    Args:
        checkpoint: headers and config, from `read_checkpoint`.
        target: device and activation dtype.
        tp_size: number of tensor-parallel ranks.
        ranks: the ranks to check; all of them by default. The plan is the first's.

    Raises:
        UnsupportedCheckpoint: the checkpoint as a whole is not supported.
    """
    fmt = format_for(checkpoint)
    layers, unquantized, errors = _read_layers(checkpoint, fmt)
    problems = merge_problems(errors).problems
    if problems:
        # What is left of a fused layer whose other part is refused is no layer
        refused = {_vllm_layer(problem.layer)[0] for problem in problems}
        layers = {name: fmt for name, fmt in layers.items() if _vllm_layer(name)[0] not in refused}
    plans: list[LayerPlan] = []
    for rank in ranks if ranks is not None else range(tp_size):
        rank_plans, rank_errors = _plan_rank(checkpoint, layers, target, tp_size, rank)
        plans = plans or rank_plans
        if rank_errors and not problems:
            error = _with_way_out(rank_errors, checkpoint, layers, target, tp_size)
            return Survey(ModelPlan(tp_size, tuple(plans), tuple(unquantized)), error.problems)
    return Survey(
        ModelPlan(tp_size, tuple(plans), tuple(unquantized)), tuple(fold_problems(problems))
    )


def plan_model(
    checkpoint: Checkpoint, target: Target, tp_size: int = 1, ranks: Iterable[int] | None = None
) -> ModelPlan:
    """`survey_model` where nothing less than the whole model will do.

    Raises:
        UnsupportedCheckpoint: the checkpoint as a whole is not supported.
        PreflightError: every problem of every layer, with the tensor-parallel sizes that work.
    """
    survey = survey_model(checkpoint, target, tp_size, ranks)
    if survey.problems:
        raise PreflightError(survey.problems)
    return survey.plan


def quantized_layers(checkpoint: Checkpoint, fmt: CheckpointFormat) -> dict[str, LayerFormat]:
    """Every quantized module by name; raises PreflightError as `plan_model` does."""
    layers, _, errors = _read_layers(checkpoint, fmt)
    if errors:
        raise PreflightError(fold_problems(merge_problems(errors).problems))
    return layers


def working_tp_sizes(checkpoint: Checkpoint, target: Target) -> tuple[int, ...]:
    """Tensor-parallel sizes up to 16 at which every layer of the checkpoint runs fused."""
    layers, _, errors = _read_layers(checkpoint, format_for(checkpoint))
    return () if errors else _working_sizes(checkpoint, layers, target)


def _read_layers(
    checkpoint: Checkpoint, fmt: CheckpointFormat
) -> tuple[dict[str, LayerFormat], list[str], list[PreflightError]]:
    layers: dict[str, LayerFormat] = {}
    errors: list[PreflightError] = []
    for module in sorted(fmt.modules(), key=_natural):
        try:
            layer = fmt.spec_for(module)
        except PreflightError as error:
            errors.append(error)
            continue
        if layer is not None:
            layers[module] = layer
    unquantized = [
        module
        for module, stored in sorted(
            checkpoint.modules().items(), key=lambda item: _natural(item[0])
        )
        if module not in layers and (weight := stored.get("weight")) and len(weight.shape) == 2
    ]
    if not layers and not errors:
        errors.append(
            PreflightError(
                [
                    Problem(
                        layer=str(checkpoint.path),
                        found="no quantized layer in the safetensors headers",
                        supported="checkpoints whose linear layers are stored packed",
                        fix="serve it without --quantization fusedq",
                    )
                ]
            )
        )
    return layers, unquantized, errors


def _shards(
    checkpoint: Checkpoint,
    modules: Iterable[str],
    layers: dict[str, LayerFormat],
    tp: int,
    rank: int,
) -> tuple[list[LayerShard], list[PreflightError]]:
    """vLLM's layers from the checkpoint's modules: siblings fused, each part cut for the rank."""
    # vLLM replicates them where ranks outnumber them
    kv_heads = checkpoint.number("num_key_value_heads", "num_attention_heads")
    groups: dict[str, list[tuple[str, str | int | None]]] = defaultdict(list)
    for module in modules:
        prefix, shard_id = _vllm_layer(module)
        groups[prefix].append((module, shard_id))
    shards, errors = [], []
    for prefix, members in groups.items():
        style = style_of(members[0][0])
        try:
            if is_lm_head(prefix):
                shards.append(shard_head(prefix, layers[prefix].n, layers[prefix].k, tp, rank))
                continue
            if is_input_embedding(prefix):
                sizes = (layers[prefix].n, layers[prefix].k)
                shards.append(shard_embedding(prefix, *sizes, tp, rank, is_tied(checkpoint)))
                continue
            parts = tuple(
                shard_module(
                    module, sid, layers[module].n, layers[module].k, style, tp, rank, kv_heads
                )
                for module, sid in _in_fused_order(members)
            )
        except UnevenSplit as error:
            problem = Problem(
                layer=prefix,
                found=str(error),
                supported="tensor-parallel sizes that divide the layer evenly",
                fix="choose another --tensor-parallel-size",
            )
            errors.append(PreflightError([problem]))
            continue
        shards.append(LayerShard(prefix, style, tp, parts))
    return shards, errors


def _vllm_layer(module: str) -> tuple[str, str | int | None]:
    """The vLLM layer that a checkpoint module is loaded into, and which part of it."""
    parent, _, name = module.rpartition(".")
    fused, shard_id = _FUSED_NAMES.get(name, (name, None))
    return f"{parent}.{fused}" if parent else fused, shard_id


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10; files list tensors in any order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _in_fused_order(
    members: list[tuple[str, str | int | None]],
) -> list[tuple[str, str | int | None]]:
    order = [shard_id for parts in FUSED_LAYERS.values() for _, shard_id in parts]
    return sorted(members, key=lambda member: order.index(member[1]) if member[1] in order else 0)


def _plan_rank(
    checkpoint: Checkpoint, layers: dict[str, LayerFormat], target: Target, tp: int, rank: int
) -> tuple[list[LayerPlan], list[PreflightError]]:
    shards, errors = _shards(checkpoint, layers, layers, tp, rank)
    heads = checkpoint.number("num_attention_heads")
    if heads and heads % tp:
        problem = Problem(
            layer=checkpoint.path,
            found=f"{heads} attention heads at tensor_parallel_size {tp}",
            supported="tensor-parallel sizes that divide the attention heads, as vLLM demands",
            fix="choose another --tensor-parallel-size",
        )
        errors.append(PreflightError([problem]))
    plans = []
    for shard in shards:
        try:
            plans.append(plan_layer(shard, layers, target))
        except PreflightError as error:
            errors.append(error)
    return plans, errors


def _working_sizes(
    checkpoint: Checkpoint, layers: dict[str, LayerFormat], target: Target
) -> tuple[int, ...]:
    return tuple(
        tp
        for tp in TP_CANDIDATES
        if not any(_plan_rank(checkpoint, layers, target, tp, rank)[1] for rank in range(tp))
    )


def _with_way_out(
    errors: list[PreflightError],
    checkpoint: Checkpoint,
    layers: dict[str, LayerFormat],
    target: Target,
    tp: int,
) -> PreflightError:
    """The errors of one rank; where another split would do, each names the sizes that work."""
    sizes = [size for size in _working_sizes(checkpoint, layers, target) if size != tp]
    problems = fold_problems(merge_problems(errors).problems)
    if sizes:
        listing = ", ".join(map(str, sizes))
        way_out = f"tensor-parallel sizes that work for the whole model: {listing}"
        problems = [replace(problem, fix=f"{problem.fix}; {way_out}") for problem in problems]
    return PreflightError(problems)


def fold_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Equal problems of numbered layers as one: `model.layers.0-31.mlp.down_proj (32 layers)`."""
    folded: dict[tuple[str, str, str, str], list[tuple[int, Problem]]] = defaultdict(list)
    for problem in problems:
        match = _LAYER_INDEX.search(problem.layer)
        index = int(match.group(1)) if match else -1
        pattern = _LAYER_INDEX.sub(".{}.", problem.layer, count=1)
        key = (pattern, problem.found, problem.supported, problem.fix)
        folded[key].append((index, problem))
    result = []
    for (pattern, *_), members in folded.items():
        if len(members) == 1:
            result.append(members[0][1])
            continue
        label = pattern.replace("{}", index_ranges([index for index, _ in members]), 1)
        result.append(replace(members[0][1], layer=f"{label} ({len(members)} layers)"))
    return result


def index_ranges(indices: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


_LAYER_INDEX = re.compile(r"\.(\d+)\.")
