"""The experts of one layer: all there, all alike, and which of them, or what of each, a rank holds.

vLLM's layer of experts has two weights: w13, gate (w1) and up (w3) by turns, and w2, the way back.
Where experts have no gate, w13 is the way up alone, and vLLM's loaders call it w1.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fusedq_kernels.catalogue import Op
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import PLAIN_DTYPES
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.headers import REDO
from vllm_fusedq.formats.layer import LayerFormat, Region
from vllm_fusedq.names import EXPERT_PARTS, expert_module, index_ranges
from vllm_fusedq.plan.shards import LayerShard, ParallelStyle, PartShard, UnevenSplit, even_slice

# As the models of vLLM read them
_COUNTS = (
    *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "num_routed_experts",
)
TOP_K = (
    *("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"),
    "num_experts_per_token",
)
"""Names under which models' configs say how many experts a token asks."""
GATE, UP, DOWN = "w1", "w3", "w2"
PARTS = (GATE, UP, DOWN)
W13, W2 = "w13", "w2"
WEIGHTS = (W13, W2)
BIAS = "bias"
_NAMES = tuple(name for name in EXPERT_PARTS if name.endswith("proj"))
_ALIKE = "experts whose gate, up and down projections are all quantized, each kind in one way"
_ALL_BIASED = "a bias [out_features] in 16 or 32 bits of every expert, or of none"
_WITHOUT = "serve this model without --quantization fusedq"
_AGAIN = "quantize the model again with all experts of a layer alike"


@dataclass(frozen=True, slots=True)
class ExpertSplit:
    """How vLLM spreads the experts of a layer over ranks.

    `data_size` data-parallel copies of everything else share one set of experts. Where `parallel` a
    rank holds whole experts, as many as the others or one more; else a part of every one.
    """

    parallel: bool = False
    data_size: int = 1


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The experts of one layer in the checkpoint: of each, by number, its matrices by part."""

    name: str
    experts: tuple[Mapping[str, LayerFormat], ...]
    biased: frozenset[str] = frozenset()
    """The weights, w13 or w2, to which the checkpoint has biases."""
    top_k: int = 0
    """How many of them a token asks, 0 where the config does not say."""

    @property
    def formats(self) -> dict[str, LayerFormat]:
        """By module."""
        return {each.module: each for expert in self.experts for each in expert.values()}

    @property
    def is_gated(self) -> bool:
        return GATE in self.experts[0]

    @property
    def hidden(self) -> int:
        return self.experts[0][UP].k

    @property
    def inner(self) -> int:
        return self.experts[0][UP].n


def expert_stacks(
    checkpoint: Checkpoint, layers: Mapping[str, LayerFormat]
) -> tuple[list[ExpertStack], list[Problem]]:
    """The stacks of the quantized `layers` of a checkpoint, and what stands against the others."""
    members: dict[str, dict[str, LayerFormat]] = defaultdict(dict)
    for module, layer in layers.items():
        if expert := expert_module(module):
            members[expert.stack][module] = layer
    stacks, problems = [], []
    for name, formats in members.items():
        try:
            stacks.append(expert_stack(checkpoint, name, formats))
        except PreflightError as error:
            problems += error.problems
    return stacks, problems


def expert_stack(
    checkpoint: Checkpoint, name: str, formats: Mapping[str, LayerFormat]
) -> ExpertStack:
    """The stack of the quantized modules `formats` below `name`, all of one layer.

    Raises:
        PreflightError: every expert that is missing, unquantized or unlike the others.
    """
    found: dict[int, dict[str, LayerFormat]] = defaultdict(dict)
    named: dict[str, str] = {}
    for module, layer in formats.items():
        expert = expert_module(module)
        if expert is None or expert.part is None:
            raise AssertionError(f"{module} is no part of an expert")
        found[expert.index][expert.part] = layer
        named[expert.part] = expert.name
    absent = [part for part in PARTS if part not in named]
    if absent not in ([], [GATE]):
        raise PreflightError.single(
            layer=name,
            found=f"experts without {' and '.join(absent)} "
            f"(only {', '.join(sorted(named.values()))})",
            supported=f"experts of three matrices ({', '.join(_NAMES)} or {', '.join(PARTS)}), or "
            "of two without a gate",
            fix=_WITHOUT,
        )
    count = max(checkpoint.number(*_COUNTS) or 0, max(found) + 1)
    problems = [
        _missing(
            checkpoint, f"{name}.{index}.{named[part]}", sum(part in e for e in found.values())
        )
        for index in range(count)
        for part in PARTS
        if part in named and part not in found.get(index, {})
    ]
    if not problems:
        problems = _unlike(found)
    if not problems:
        problems = _misfits(name, found[0][UP], found[0][DOWN])
    if problems:
        raise PreflightError(problems)
    biased = []
    for weight, parts in _weights(named).items():
        modules = [expert[part].module for expert in found.values() for part in parts]
        with_bias = [module for module in modules if BIAS in checkpoint.modules()[module]]
        problems += _bias_problems(checkpoint, modules, with_bias)
        biased += [weight] * bool(with_bias)
    if problems:
        raise PreflightError(problems)
    top_k = checkpoint.number(*TOP_K) or 0
    experts = tuple(found[index] for index in range(count))
    return ExpertStack(name, experts, frozenset(biased), top_k)


def _weights(parts: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The parts that each weight is made of, for experts of these."""
    return {W13: tuple(part for part in (GATE, UP) if part in parts), W2: (DOWN,)}


def _missing(checkpoint: Checkpoint, module: str, others: int) -> Problem:
    stored = checkpoint.modules().get(module, {})
    what = "an unquantized weight" if "weight" in stored else "no such module"
    return Problem(module, f"{what}, where {others} experts have a quantized one", _ALIKE, _AGAIN)


def _unlike(found: Mapping[int, Mapping[str, LayerFormat]]) -> list[Problem]:
    """Experts whose w13 or w2 is not quantized as most are, or not of their size."""
    problems = []
    for parts in _weights(found[0]).values():
        kinds = {
            (index, part): (expert[part].spec, expert[part].ordered, expert[part].n, expert[part].k)
            for index, expert in found.items()
            for part in parts
        }
        usual = Counter(kinds.values()).most_common(1)[0][0]
        example = next(found[index][part] for (index, part), kind in kinds.items() if kind == usual)
        for (index, part), kind in kinds.items():
            if kind != usual:
                layer = found[index][part]
                told = f"{_told(layer)}, where most experts of the layer have {_told(example)}"
                problems.append(Problem(layer.module, told, _ALIKE, _AGAIN))
    return problems


def _bias_problems(
    checkpoint: Checkpoint, modules: Sequence[str], biased: Sequence[str]
) -> list[Problem]:
    if not biased:
        return []
    told = f"no bias, which {len(biased)} of {len(modules)} like it have"
    lacking = [module for module in modules if module not in set(biased)]
    problems = [Problem(module, told, _ALL_BIASED, REDO) for module in lacking]
    for module in biased:
        info = checkpoint.modules()[module][BIAS]
        if info.dtype not in PLAIN_DTYPES or len(info.shape) != 1:
            told = f"a bias {info.dtype} {list(info.shape)}"
            problems.append(Problem(module, told, _ALL_BIASED, REDO))
    return problems


def _told(layer: LayerFormat) -> str:
    scales = layer.spec.scale_dtype.value
    return f"[{layer.n}, {layer.k}] {layer.description}, scales in {scales}"


def _misfits(name: str, up: LayerFormat, down: LayerFormat) -> list[Problem]:
    if (up.n, up.k) == (down.k, down.n):
        return []
    sizes = f"[{up.n}, {up.k}] on the way in and [{down.n}, {down.k}] on the way back"
    return [Problem(name, f"experts of {sizes}", "matrices that fit each other", REDO)]


def local_experts(count: int, ranks: int, rank: int) -> range:
    """The experts of a rank, as vLLM places them: in order, one more on the first ranks.

    Raises:
        UnevenSplit: a rank would hold none.
    """
    if count < ranks:
        raise UnevenSplit(f"{count} experts cannot be spread over {ranks} ranks")
    share, more = divmod(count, ranks)
    start = rank * share + min(rank, more)
    return range(start, start + share + (rank < more))


def shard_experts(
    stack: ExpertStack, tp_size: int, rank: int, split: ExpertSplit = ExpertSplit()
) -> tuple[LayerShard, LayerShard]:
    """The rank's w13 and w2; `rank` counts data-parallel copies, tensor-parallel ranks fastest.

    Raises:
        UnevenSplit: ranks cannot hold equal parts of an expert, or an expert each.
    """
    ranks = tp_size * split.data_size
    if split.parallel:
        held = local_experts(len(stack.experts), ranks, rank)
        return stack_shards(stack, held, (0, stack.inner), 1, stack.name)
    inner = even_slice(stack.inner, ranks, rank, "features inside of an expert")
    return stack_shards(stack, range(len(stack.experts)), inner, ranks, stack.name)


def stack_shards(
    stack: ExpertStack, held: Sequence[int], inner: tuple[int, int], tp_size: int, prefix: str
) -> tuple[LayerShard, LayerShard]:
    """w13 and w2 of the experts `held`, cut to the features `inner` between their products.

    `tp_size` ranks share an expert; `prefix` is what the layer is called in plans and errors.
    """
    into, back = Region(*inner, 0, stack.hidden), Region(0, stack.hidden, *inner)
    shards = []
    first = stack.experts[0]
    for (weight, parts), region in zip(_weights(first).items(), (into, back), strict=True):
        shard = LayerShard(
            prefix=prefix,
            style=ParallelStyle.COLUMN if weight == W13 else ParallelStyle.ROW,
            tp_size=tp_size,
            parts=tuple(
                PartShard(
                    stack.experts[index][part].module,
                    GATE if part == UP and not stack.is_gated else part,
                    region,
                )
                for index in held
                for part in parts
            ),
            ops=(Op.EXPERTS,),
            weight=weight,
            experts=tuple(held),
            alternating=len(parts) > 1,
            biased=weight in stack.biased,
            top_k=stack.top_k,
            all_experts=len(stack.experts),
        )
        shards.append(shard)
    return shards[0], shards[1]


def experts_told(experts: tuple[int, ...] | None) -> str:
    """Like "128 experts" or "experts 4-7", for messages and tables."""
    if experts is None:
        return ""
    whole = experts == tuple(range(len(experts)))
    return f"{len(experts)} experts" if whole else f"experts {index_ranges(experts)}"
