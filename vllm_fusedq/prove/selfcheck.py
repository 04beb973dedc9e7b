"""Checks every layer of a checkpoint on this machine: packing bit by bit, kernel against reference.

For each layer the checkpoint's tensors are decoded once more and compared with what the resident
weight unpacks to; then random activations are multiplied by the fused kernel and, in float64 and
plain PyTorch, by the decoded weight. On a GPU every launch that a layer can reach is compared as
the loader's warm-up does, in batch-invariant mode too. No vLLM is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fusedq_kernels import ops, reference
from fusedq_kernels.activation import SILU
from fusedq_kernels.call import ALTERNATION, ExpertsCall
from fusedq_kernels.catalogue import Op
from fusedq_kernels.experts import ResidentExperts, Stack
from fusedq_kernels.guard_experts import choices
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import Layout, LogicalWeight, PackedWeight, Policy
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.errors import KernelError
from vllm_fusedq.formats import stored_slices
from vllm_fusedq.formats.layer import LayerFormat, Region
from vllm_fusedq.load.experts import ExpertsLoader
from vllm_fusedq.load.loader import LayerLoader, rows_of
from vllm_fusedq.load.stored import stored_tensor
from vllm_fusedq.plan.experts import BIAS
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.shards import PartShard
from vllm_fusedq.prove.expert_passes import UNGATED, with_each_activation, wrong_pass
from vllm_fusedq.prove.launches import Loaded, LoadedExperts, LoadedLayer, on_gpu, run_launches

# Few, some and many tokens: decode and prefill run other tiles.
TOKENS = (1, 17, 96)
# Launches for up to so many tokens are compared on a GPU; vLLM's largest default batch.
MAX_TOKENS = 16384
MODES = (Policy(), Policy(batch_invariant=True))
# Rows decoded at a time: bounds the float64 copy of the weight.
ROWS = 1024


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """What was found for one layer.

    `wrong_values` counts codes, scales and zero points that the resident weight holds wrongly, and
    values of an embedding that are looked up wrongly. `max_error` and `rms_error` are of the worst
    of several numbers of tokens, relative to the root-mean-square of the reference; `limit` is what
    rounding alone can explain of `max_error`. `launches`, on a CPU passes of experts, were compared
    too, and `wrong_launch` says which of them is wrong and how.
    """

    plan: LayerPlan
    wrong_values: int
    max_error: float
    rms_error: float
    limit: float
    launches: int = 0
    wrong_launch: str = ""

    @property
    def passed(self) -> bool:
        right = self.wrong_values == 0 and self.max_error <= self.limit
        return right and not self.wrong_launch


def check_layer(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    target: Target,
    device: torch.device,
    w2: LayerPlan | None = None,
) -> LayerCheck:
    """Load one layer of `plan` (a single rank's) onto `device` and check it.

    Of experts each is checked as a weight of its own, in the stack that they share. With
    `w2`, whose layer's w13 is `plan`, what both do together is compared too, with each activation.

    Raises:
        WeightLoadError: a tensor holds values that cannot be right.
    """
    stored = dict(_stored(checkpoint, plan))
    if plan.experts is not None:
        return _check_experts(checkpoint, plan, stored, target, device, w2)
    loader = LayerLoader.create(plan, target.act_dtype, device)
    # A shard may lie in several ranges of rows, and takes its tensors once
    for (shard_id, name), tensor in {(p.shard_id, n): t for (p, n), t in stored.items()}.items():
        loader.add(name, tensor, shard_id)
    loader.check_complete()
    has_bias = any(f"{part.module}.bias" in checkpoint.tensors for part in plan.shard.parts)
    layer = LoadedLayer(plan.name, loader.packed, plan.uses, has_bias)
    return _check_weight(plan, loader.packed, stored, target, _launches(layer, target))


def _check_experts(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    stored: dict[tuple[PartShard, str], torch.Tensor],
    target: Target,
    device: torch.device,
    w2: LayerPlan | None,
) -> LayerCheck:
    experts = _load_experts(checkpoint, plan, stored, target, device)
    launches = (0, "")
    if w2 is not None:
        other = _load_experts(checkpoint, w2, dict(_stored(checkpoint, w2)), target, device)
        usual = SILU if plan.shard.alternating else UNGATED[0]
        call = ExpertsCall(experts.packed.count, usual, plan.main.call, w2.main.call)
        stacks = (Stack(**each.resident) for each in (experts, other))
        resident = ResidentExperts(call, *stacks, plan.shard.top_k or 1)
        launches = _passes(LoadedExperts(plan.prefix, resident), target)
    checks = [
        _check_weight(each.plan, each.packed, stored, target, (0, "")) for each in experts.loaders
    ]
    return LayerCheck(
        plan,
        sum(check.wrong_values for check in checks),
        max(check.max_error for check in checks),
        max(check.rms_error for check in checks),
        checks[0].limit,
        *launches,
    )


def _load_experts(
    checkpoint: Checkpoint,
    plan: LayerPlan,
    stored: dict[tuple[PartShard, str], torch.Tensor],
    target: Target,
    device: torch.device,
) -> ExpertsLoader:
    experts = ExpertsLoader.create(plan, target.act_dtype, device)
    numbers = [number for number in plan.experts for _ in plan.of_expert(0).shard.parts]
    of_part = dict(zip(plan.shard.parts, numbers, strict=True))
    for (part, name), tensor in stored.items():
        experts.add(name, tensor, part.shard_id, of_part[part])
    for part in plan.shard.parts if plan.shard.biased else ():
        experts.add(
            BIAS, stored_tensor(checkpoint, f"{part.module}.{BIAS}"), part.shard_id, of_part[part]
        )
    experts.check_complete()
    return experts


def _check_weight(
    plan: LayerPlan,
    packed: PackedWeight,
    stored: dict[tuple[PartShard, str], torch.Tensor],
    target: Target,
    launches: tuple[int, str],
) -> LayerCheck:
    if launches[1]:
        return LayerCheck(plan, 0, 0.0, 0.0, _limit(target.act_dtype.torch), *launches)
    device, resident = packed.qweight.device, packing.unpack(packed)
    generator = torch.Generator().manual_seed(0)
    product, lookup = plan.use(Op.MATMUL), plan.use(Op.EMBEDDING)
    xs = [
        torch.randn(m, plan.k, generator=generator).to(device, target.act_dtype.torch)
        for m in (TOKENS if product else ())
    ]
    found = [ops.matmul(x, packed, None, product.call.kernel).double() for x in xs]
    wrong, expected, places = 0, [[] for _ in xs], []
    for rows, weight in _decoded(plan, stored, device):
        wrong += _differences(resident, weight, rows)
        if lookup is not None:
            gather, act_dtype = lookup.call.kernel, target.act_dtype.torch
            wrong += _wrong_rows(packed, weight, rows, gather, act_dtype)
        for answers, x in zip(expected, xs, strict=True):
            answers.append(reference.matmul(x, weight))
        places.append(rows)
    errors = [
        _errors(y[:, torch.cat(places)], torch.cat(answers, dim=1))
        for y, answers in zip(found, expected, strict=True)
    ]
    return LayerCheck(
        plan,
        wrong,
        max((worst for worst, _ in errors), default=0.0),
        max((rms for _, rms in errors), default=0.0),
        _limit(target.act_dtype.torch),
        *launches,
    )


def _passes(layer: LoadedExperts, target: Target) -> tuple[int, str]:
    """`_launches` with every activation, of a CPU whole calls; few tokens of all but the usual."""
    count = 0
    usual, *others = with_each_activation(layer)
    for each in (usual, *others):
        if on_gpu(layer.packed):
            tokens, modes = (MAX_TOKENS, MODES) if each is usual else (TOKENS[-1], MODES[:1])
            found, wrong = _launches(each, target, tokens, modes)
        else:
            ways = choices(each.resident)
            chosen = ways if each is usual else ways[1:]
            wrong = next(filter(None, (wrong_pass(each, way) for way in chosen)), "")
            found = 0 if wrong else len(chosen)
        count += found
        if wrong:
            return count, wrong
    return count, ""


def _launches(
    layer: Loaded,
    target: Target,
    max_tokens: int | None = None,
    modes: tuple[Policy, ...] | None = None,
) -> tuple[int, str]:
    """The number of launches in modes that are right, and what is said of the first wrong one."""
    if not on_gpu(layer.packed):
        return 0, ""
    count, truth = 0, layer.truth(target)
    for policy in modes or MODES:
        mode = replace(target, policy=policy)
        try:
            count += run_launches(layer, mode, max_tokens or MAX_TOKENS, truth)
        except KernelError as error:
            return count, str(error)
    return count, ""


def _stored(
    checkpoint: Checkpoint, plan: LayerPlan
) -> Iterator[tuple[tuple[PartShard, str], torch.Tensor]]:
    for part, fmt in zip(plan.shard.parts, plan.formats, strict=True):
        for stored in fmt.tensors:
            yield (part, stored.name), stored_tensor(checkpoint, f"{part.module}.{stored.name}")


def _decoded(
    plan: LayerPlan, stored: dict[tuple[PartShard, str], torch.Tensor], device: torch.device
) -> Iterator[tuple[torch.Tensor, LogicalWeight]]:
    """The layer's logical rows from the checkpoint, some at a time, and where they are resident."""
    before = 0
    for index, (part, fmt) in enumerate(zip(plan.shard.parts, plan.formats, strict=True)):
        whole = part.region
        for first in range(0, whole.n, ROWS):
            region = rows_of(whole, first, min(first + ROWS, whole.n))
            rows = torch.arange(first, first + region.n, device=device)
            if plan.shard.alternating:
                rows = (2 * (rows // ALTERNATION) + index) * ALTERNATION + rows % ALTERNATION
            yield (
                before * (not plan.shard.alternating) + rows,
                fmt.packing.logical(_cut(fmt, part, stored, region, device), fmt, region),
            )
        before += whole.n


def _cut(
    fmt: LayerFormat,
    part: PartShard,
    stored: dict[tuple[PartShard, str], torch.Tensor],
    region: Region,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    grids = {each: fmt.grid(each, stored[part, each.name]) for each in fmt.tensors}
    return {
        each.name: grid[stored_slices(each, region, fmt.spec.group_size)].to(device)
        for each, grid in grids.items()
    }


def _differences(resident: LogicalWeight, weight: LogicalWeight, rows: torch.Tensor) -> int:
    wrong = int((resident.codes[rows] != weight.codes).sum())
    # The CPU operator keeps scales in the dtype of the activations
    scales = weight.scales.to(resident.scales.dtype)
    wrong += int((resident.scales[rows] != scales).sum())
    if weight.zeros is not None:
        wrong += int((resident.zeros[rows] != weight.zeros).sum())
    if weight.perm is not None:
        wrong += int((resident.perm != weight.perm).sum())
    return wrong


def _wrong_rows(
    packed: PackedWeight,
    weight: LogicalWeight,
    ids: torch.Tensor,
    gather: str,
    act_dtype: torch.dtype,
) -> int:
    """Values of rows `ids` that are not the decoded ones, rounded once."""
    # The CPU operator's layout keeps scales in the dtype of the activations
    kept = act_dtype if packed.layout is Layout.CPU_WNA16 else weight.scales.dtype
    rows = reference.dequantize(replace(weight, scales=weight.scales.to(kept)), act_dtype)
    if weight.perm is not None:
        rows = torch.empty_like(rows).index_copy_(1, weight.perm.long(), rows)
    return int((ops.embedding(ids, packed, gather, act_dtype) != rows.to(act_dtype)).sum())


def _errors(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Worst and root-mean-square error; a value that is not finite is infinitely wrong."""
    scale = expected.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    error = (found - expected).abs().div(scale).nan_to_num(nan=torch.inf)
    return error.max().item(), error.square().mean().sqrt().item()


def _limit(act_dtype: torch.dtype) -> float:
    """Outputs within 6 RMS, rounded once; roundings of weights and scales add up at random."""
    return 8 * torch.finfo(act_dtype).eps
