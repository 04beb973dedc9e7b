"""Whole-checkpoint planning from headers alone: every layer, every problem, before any weight.

Used by `fusedq check` and by the vLLM configuration hook in the API process.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fusedq_kernels.catalogue import Op
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats import format_for
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding, is_tied
from vllm_fusedq.names import natural, vllm_layer
from vllm_fusedq.plan.experts import ExpertSplit, ExpertStack, expert_stacks
from vllm_fusedq.plan.folding import fold_problems
from vllm_fusedq.plan.kv_cache import kv_cache_problems
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer, target_problems
from vllm_fusedq.plan.model_code import rearranged
from vllm_fusedq.plan.together import join_experts
from vllm_fusedq.plan.vllm_layers import shards_of_rank

TP_CANDIDATES = (1, 2, 4, 8, 16)
CUT = ExpertSplit()


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What will run where: every quantized layer of one rank, and what stays unquantized."""

    tp_size: int
    layers: tuple[LayerPlan, ...]
    unquantized: tuple[str, ...]
    split: ExpertSplit = CUT


@dataclass(frozen=True, slots=True)
class Survey:
    """A ModelPlan as far as it goes: the layers of one rank that run fused, and what stands
    against the others. Without problems it is the plan."""

    plan: ModelPlan
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint's quantized modules, experts among them once more as stacks, those that it
    leaves unquantized, and what stands against the others."""

    layers: Mapping[str, LayerFormat]
    stacks: Sequence[ExpertStack]
    unquantized: tuple[str, ...]
    problems: Sequence[Problem]


def survey_model(
    checkpoint: Checkpoint,
    target: Target,
    tp_size: int = 1,
    ranks: Iterable[int] | None = None,
    split: ExpertSplit = CUT,
) -> Survey:
    """Plan every quantized layer for `tp_size` ranks, and name every reason against one.

    Args:
        checkpoint: headers and config, from `read_checkpoint`.
        target: device and activation dtype.
        tp_size: number of tensor-parallel ranks.
        ranks: the ranks to check, those of data-parallel copies behind the first's; all of them by
            default. The plan is the first's.
        split: how they share experts.

    Raises:
        UnsupportedCheckpoint: the checkpoint as a whole is not supported.
    """
    found = _read_layers(checkpoint, format_for(checkpoint))
    if nowhere := target_problems(target):
        nothing = ModelPlan(tp_size, (), found.unquantized, split)
        return Survey(nothing, tuple(fold_problems([*nowhere, *found.problems])))
    problems, plans = list(found.problems), []
    for rank in ranks if ranks is not None else range(_ranks(found, tp_size, split)):
        rank_plans, rank_problems = _plan_rank(checkpoint, found, target, tp_size, rank, split)
        plans = plans or rank_plans
        if rank_problems and not problems:
            problems = _with_way_out(rank_problems, checkpoint, found, target, tp_size, split)
            break
    plan = ModelPlan(tp_size, tuple(plans), found.unquantized, split)
    return Survey(plan, tuple(fold_problems(problems)))


def plan_model(
    checkpoint: Checkpoint,
    target: Target,
    tp_size: int = 1,
    ranks: Iterable[int] | None = None,
    split: ExpertSplit = CUT,
) -> ModelPlan:
    """`survey_model` where nothing less than the whole model will do.

    Raises:
        UnsupportedCheckpoint: the checkpoint as a whole is not supported.
        PreflightError: every problem of every layer, with the tensor-parallel sizes that work.
    """
    survey = survey_model(checkpoint, target, tp_size, ranks, split)
    if survey.problems:
        raise PreflightError(survey.problems)
    return survey.plan


def quantized_layers(checkpoint: Checkpoint, fmt: CheckpointFormat) -> Mapping[str, LayerFormat]:
    """Every quantized module by name; raises PreflightError as `plan_model` does."""
    found = _read_layers(checkpoint, fmt)
    if found.problems:
        raise PreflightError(fold_problems(found.problems))
    return found.layers


def _read_layers(checkpoint: Checkpoint, fmt: CheckpointFormat) -> _Found:
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
    if problems:
        # What is left of a fused layer whose other part is refused is no layer
        refused = {vllm_layer(problem.layer)[0] for problem in problems}
        layers = {name: fmt for name, fmt in layers.items() if vllm_layer(name)[0] not in refused}
    stacks, odd = expert_stacks(checkpoint, layers)
    return _Found(layers, stacks, tuple(unquantized), [*problems, *odd])


def _ranks(found: _Found, tp_size: int, split: ExpertSplit) -> int:
    """How many ranks hold different parts of the model."""
    return tp_size * split.data_size if found.stacks else tp_size


def _plan_rank(
    checkpoint: Checkpoint,
    found: _Found,
    target: Target,
    tp: int,
    rank: int,
    split: ExpertSplit,
) -> tuple[list[LayerPlan], list[Problem]]:
    shards, problems = shards_of_rank(checkpoint, found.layers, found.stacks, tp, rank, split)
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
            plans.append(plan_layer(shard, found.layers, target))
        except PreflightError as error:
            problems += error.problems
    try:
        plans = join_experts(plans)
    except PreflightError as error:
        problems += error.problems
    return plans, problems


def _working_sizes(
    checkpoint: Checkpoint, found: _Found, target: Target, split: ExpertSplit
) -> tuple[int, ...]:
    return tuple(
        tp
        for tp in TP_CANDIDATES
        if not any(
            _plan_rank(checkpoint, found, target, tp, rank, split)[1]
            for rank in range(_ranks(found, tp, split))
        )
    )


def _with_way_out(
    problems: list[Problem],
    checkpoint: Checkpoint,
    found: _Found,
    target: Target,
    tp: int,
    split: ExpertSplit,
) -> list[Problem]:
    """The problems of one rank; where another split would do, each names the sizes that work."""
    sizes = [size for size in _working_sizes(checkpoint, found, target, split) if size != tp]
    if not sizes:
        return problems
    listing = ", ".join(map(str, sizes))
    way_out = f"tensor-parallel sizes that work for the whole model: {listing}"
    return [replace(problem, fix=f"{problem.fix}; {way_out}") for problem in problems]


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
