"""Whole-checkpoint planning from headers alone: every layer, every problem, before any weight.

Used by `fusedq check` and by the vLLM configuration hook in the API process.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fusedq_kernels.catalogue import Op
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats import format_for
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding, is_lm_head, is_tied
from vllm_fusedq.names import FUSED_LAYERS, fold, natural, unnumbered, vllm_layer
from vllm_fusedq.plan.attention import kv_heads
from vllm_fusedq.plan.kv_cache import kv_cache_problems
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer, target_problems
from vllm_fusedq.plan.model_code import head_order, rearranged, state_rows
from vllm_fusedq.plan.shards import (
    LayerShard,
    UnevenSplit,
    shard_embedding,
    shard_head,
    shard_module,
    style_of,
)

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
    layers, unquantized, problems = _read_layers(checkpoint, fmt)
    if nowhere := target_problems(target):
        nothing = ModelPlan(tp_size, (), tuple(unquantized))
        return Survey(nothing, tuple(fold_problems([*nowhere, *problems])))
    if problems:
        # What is left of a fused layer whose other part is refused is no layer
        refused = {vllm_layer(problem.layer)[0] for problem in problems}
        layers = {name: fmt for name, fmt in layers.items() if vllm_layer(name)[0] not in refused}
    plans: list[LayerPlan] = []
    for rank in ranks if ranks is not None else range(tp_size):
        rank_plans, rank_problems = _plan_rank(checkpoint, layers, target, tp_size, rank)
        plans = plans or rank_plans
        if rank_problems and not problems:
            problems = _with_way_out(rank_problems, checkpoint, layers, target, tp_size)
            break
    plan = ModelPlan(tp_size, tuple(plans), tuple(unquantized))
    return Survey(plan, tuple(fold_problems(problems)))


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
    layers, _, problems = _read_layers(checkpoint, fmt)
    if problems:
        raise PreflightError(fold_problems(problems))
    return layers


def _read_layers(
    checkpoint: Checkpoint, fmt: CheckpointFormat
) -> tuple[dict[str, LayerFormat], list[str], list[Problem]]:
    """The quantized modules, the unquantized ones, and what stands against the others."""
    layers: dict[str, LayerFormat] = {}
    problems = kv_cache_problems(fmt)
    for module in sorted(fmt.modules(), key=natural):
        try:
            layer = fmt.layer_of(module)
        except PreflightError as error:
            problems += error.problems
            continue
        if layer is None:
            continue
        if problem := rearranged(checkpoint, module):
            problems.append(problem)
        else:
            layers[module] = layer
    unquantized = [
        module
        for module, stored in sorted(
            checkpoint.modules().items(), key=lambda item: natural(item[0])
        )
        if module not in layers and (weight := stored.get("weight")) and len(weight.shape) == 2
    ]
    if not layers and not problems:
        problem = Problem(
            layer=checkpoint.path,
            found="no quantized layer in the safetensors headers",
            supported="checkpoints whose linear layers are stored packed",
            fix="serve it without --quantization fusedq",
        )
        problems.append(problem)
    return layers, unquantized, problems


def _shards(
    checkpoint: Checkpoint, layers: dict[str, LayerFormat], tp: int, rank: int
) -> tuple[list[LayerShard], list[Problem]]:
    """vLLM's layers from the checkpoint's modules: siblings fused, each part cut for the rank."""
    # vLLM replicates them where ranks outnumber them
    heads = kv_heads(checkpoint)
    groups: dict[str, list[tuple[str, str | int | None]]] = defaultdict(list)
    for module in layers:
        prefix, shard_id = vllm_layer(module)
        groups[prefix].append((module, shard_id))
    shards, problems = [], []
    for prefix, members in groups.items():
        first = members[0][0]
        style = style_of(first)
        try:
            if is_lm_head(prefix):
                shards.append(shard_head(prefix, layers[prefix].n, layers[prefix].k, tp, rank))
                continue
            if is_input_embedding(prefix):
                sizes = (layers[prefix].n, layers[prefix].k)
                shards.append(shard_embedding(prefix, *sizes, tp, rank, is_tied(checkpoint)))
                continue
            whole = (checkpoint, first, layers[first].n)
            if order := head_order(*whole) or state_rows(*whole):
                parts = order.shard(first, layers[first].k, tp, rank)
            else:
                parts = tuple(
                    shard_module(
                        module, sid, layers[module].n, layers[module].k, style, tp, rank, heads
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
            problems.append(problem)
            continue
        shards.append(LayerShard(prefix, style, tp, parts))
    return shards, problems


def _in_fused_order(
    members: list[tuple[str, str | int | None]],
) -> list[tuple[str, str | int | None]]:
    order = [shard_id for parts in FUSED_LAYERS.values() for _, shard_id in parts]
    return sorted(members, key=lambda member: order.index(member[1]) if member[1] in order else 0)


def _plan_rank(
    checkpoint: Checkpoint, layers: dict[str, LayerFormat], target: Target, tp: int, rank: int
) -> tuple[list[LayerPlan], list[Problem]]:
    shards, problems = _shards(checkpoint, layers, tp, rank)
    heads = checkpoint.number("num_attention_heads")
    if heads and heads % tp:
        problem = Problem(
            layer=checkpoint.path,
            found=f"{heads} attention heads at tensor_parallel_size {tp}",
            supported="tensor-parallel sizes that divide the attention heads, as vLLM demands",
            fix="choose another --tensor-parallel-size",
        )
        problems.append(problem)
    plans = []
    for shard in shards:
        try:
            plans.append(plan_layer(shard, layers, target))
        except PreflightError as error:
            problems += error.problems
    return plans, problems


def _working_sizes(
    checkpoint: Checkpoint, layers: dict[str, LayerFormat], target: Target
) -> tuple[int, ...]:
    return tuple(
        tp
        for tp in TP_CANDIDATES
        if not any(_plan_rank(checkpoint, layers, target, tp, rank)[1] for rank in range(tp))
    )


def _with_way_out(
    problems: list[Problem],
    checkpoint: Checkpoint,
    layers: dict[str, LayerFormat],
    target: Target,
    tp: int,
) -> list[Problem]:
    """The problems of one rank; where another split would do, each names the sizes that work."""
    sizes = [size for size in _working_sizes(checkpoint, layers, target) if size != tp]
    if not sizes:
        return problems
    listing = ", ".join(map(str, sizes))
    way_out = f"tensor-parallel sizes that work for the whole model: {listing}"
    return [replace(problem, fix=f"{problem.fix}; {way_out}") for problem in problems]


def fold_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Equal problems of numbered layers as one: `model.layers.0-31.mlp.down_proj (32 layers)`."""
    alike: dict[tuple[str, str, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        key = (unnumbered(problem.layer), problem.found, problem.supported, problem.fix)
        alike[key].append(problem)
    folded = []
    for first, *others in alike.values():
        if others:
            name = fold([problem.layer for problem in (first, *others)])
            first = replace(first, layer=f"{name} ({len(others) + 1} layers)")
        folded.append(first)
    return folded


def quantized_embeddings(fmt: CheckpointFormat) -> list[str]:
    """The checkpoint's quantized input embeddings, of which a model has one."""
    return [module for module in fmt.modules() if is_input_embedding(module)]


def check_all_created(
    fmt: CheckpointFormat, created: Iterable[LayerPlan], *, first_stage: bool, last_stage: bool
) -> None:
    """Before weights are loaded: vLLM must have built its quantized embedding with this config.

    Some of vLLM's models build their embeddings without a quantization config, and no hook is asked
    then. `created` are the plans of this rank's layers.

    Raises:
        PreflightError: the checkpoint has a quantized embedding and the model no place for it.
    """
    embeddings = quantized_embeddings(fmt)
    here = first_stage or (last_stage and is_tied(fmt.checkpoint))
    if not embeddings or not here or any(plan.use(Op.EMBEDDING) for plan in created):
        return
    raise PreflightError.single(
        layer=embeddings[0],
        found="a quantized embedding in a model that vLLM builds with an unquantized one",
        supported="models whose embedding vLLM builds with its quantization config (Llama, Qwen2 "
        "and 3, Mistral, Granite and many others)",
        fix="quantize again without the embedding",
    )
