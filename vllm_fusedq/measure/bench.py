"""Every kind of layer of a plan at several numbers of tokens, on this machine, weights random."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fusedq_kernels.catalogue import Op
from vllm_fusedq.errors import DeviceMemoryError
from vllm_fusedq.measure.contenders import (
    DENSE,
    FUSED,
    READ,
    Contender,
    cold,
    dense,
    fused,
    packed_for,
    reading,
    timed,
)
from vllm_fusedq.measure.expert_contenders import (
    Routing,
    dense_experts,
    fused_experts,
    stacked_pair,
    unquantized_experts,
)
from vllm_fusedq.measure.random_weights import random_tokens
from vllm_fusedq.measure.timing import Timing
from vllm_fusedq.measure.undecoded import ALONE, UNDECODED, without_decoding
from vllm_fusedq.plan.experts import W2, W13
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.report.table import PlanRow, plan_rows

TOKENS = (1, 4, 16, 64, 256, 2048)
ROUNDS = 15
# On a CPU no round begins after so long, for one layer and number of tokens
SECONDS = 3.0
OnProgress = Callable[[int, int], None]
# Of a number of tokens: ours first, then what it is compared with
Sides = Callable[[int], Sequence[Contender]]
# What the allocator for CPUs says
_NO_MEMORY = "can't allocate memory"


@dataclass(frozen=True)
class Row:
    """One kind of layer with M tokens; `layers` and `count` are the plan's, sizes those of a rank.

    `weight_bytes` is what one call reads of the weight, metadata included; `read_gbs` what the
    device reads at best in the same rounds. `decoding` is the part of the kernel's time that it is
    shorter by without decoding, None where that was not measured.
    """

    layers: str
    count: int
    format: str
    kernel: str
    n: int
    k: int
    m: int
    weight_bytes: int
    fused: Timing
    dense: Timing
    read_gbs: float
    decoding: float | None = None

    @property
    def gbs(self) -> float:
        """GB/s of packed weight."""
        return self.weight_bytes / self.fused.us / 1e3

    @property
    def percent_read(self) -> float:
        """Of the read bandwidth, in percent."""
        return 100 * self.gbs / self.read_gbs

    @property
    def speedup(self) -> float:
        """Times the speed of the unquantized layer."""
        return self.dense.us / self.fused.us


@dataclass(frozen=True)
class Step:
    """All measured layers of the model with M tokens, in microseconds.

    `decoding` is as of a `Row`, of the layers of which it is known.
    """

    m: int
    fused_us: float
    dense_us: float
    weight_bytes: int
    decoding: float | None


@dataclass(frozen=True)
class Bench:
    """`skipped` layers are no product, as an embedding whose rows are only looked up."""

    device: str
    dtype: str
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """One for each number of tokens."""
        found = {}
        for row in self.rows:
            found.setdefault(row.m, []).append(row)
        return tuple(
            Step(
                m,
                sum(row.count * row.fused.us for row in rows),
                sum(row.count * row.dense.us for row in rows),
                sum(row.count * row.weight_bytes for row in rows),
                _decoding(rows),
            )
            for m, rows in found.items()
        )


def _decoding(rows: Sequence[Row]) -> float | None:
    known = [(row.decoding, row.count * row.fused.us) for row in rows if row.decoding is not None]
    whole = sum(us for _, us in known)
    return sum(part * us for part, us in known) / whole if known else None


def bench(
    plans: Sequence[LayerPlan],
    tokens: Sequence[int],
    device: torch.device,
    device_name: str,
    on_progress: OnProgress,
    rounds: int = ROUNDS,
    ablate: bool = False,
) -> Bench:
    """Time every distinct layer of `plans` beside the unquantized one and beside plain reading.

    Args:
        ablate: beside itself without decoding, too, but experts.

    Raises:
        DeviceMemoryError: a layer, or what it makes of so many tokens, does not fit.
        BuildError: the CPU's kernel without decoding cannot be compiled.
    """
    rows = plan_rows(plans)
    second = {row.plan.prefix: row for row in rows if row.plan.shard.weight == W2}
    kinds: list[tuple[PlanRow, PlanRow | None]] = []
    skipped = []
    for row in rows:
        partner = second.get(row.plan.prefix) if row.plan.shard.weight == W13 else None
        if partner is not None and _pairs(row.plan):
            kinds.append((row, partner))
        elif row.plan.experts is None and row.plan.use(Op.MATMUL) is not None:
            kinds.append((row, None))
        elif row.plan.shard.weight != W2:
            skipped.append(row.name)
    found: list[Row] = []
    known: dict[object, list[Row]] = {}
    total = len(kinds) * len(tokens)
    for row, partner in kinds:
        # Layers of another name may be of the same kind
        pair = [each for each in (row, partner) if each is not None]
        kind = tuple((each.plan.main.call.text, each.plan.shard.count) for each in pair)
        kind = (kind, row.plan.ordered)
        if kind not in known:
            known[kind] = []
            with _memory_told(row.name, device_name):
                for each in _measure(row, partner, tokens, device, rounds, ablate):
                    known[kind].append(each)
                    on_progress(len(found) + len(known[kind]), total)
        named = {"layers": row.name, "count": row.count}
        found += [replace(each, **named) for each in known[kind]]
        on_progress(len(found), total)
    dtype = plans[0].main.call.dtype.value
    return Bench(device_name, dtype, tuple(found), tuple(skipped))


@contextmanager
def _memory_told(layers: str, device: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # PyTorch has an error of its own for GPUs alone
        if not isinstance(error, torch.OutOfMemoryError) and _NO_MEMORY not in str(error):
            raise
        raise DeviceMemoryError(
            f"{layers} does not fit the memory of {device}, beside the unquantized layer; ask for "
            "fewer --tokens, or raise -tp"
        ) from error


def _pairs(up: LayerPlan) -> bool:
    """Whether these experts have a gate, and the checkpoint says how many of them a token asks."""
    return up.shard.alternating and up.shard.top_k > 0


def _measure(
    row: PlanRow,
    partner: PlanRow | None,
    tokens: Sequence[int],
    device: torch.device,
    rounds: int,
    ablate: bool,
) -> Iterator[Row]:
    """One kind of layer; `partner` is the w2 of experts."""
    plan, read = row.plan, reading(device)
    call = plan.main.call
    dtype = call.dtype.torch
    outputs = plan.n if partner is None else partner.plan.n
    if partner is None:
        sides = _linear(plan, device, ablate)
    else:
        sides = _experts(plan, partner.plan, device)
    for m in tokens:
        ours, *others = sides(m)
        x = random_tokens(m, call.in_features, dtype, device)
        times = timed((read, *others, ours), x, outputs, rounds, SECONDS)
        yield Row(
            layers=row.name,
            count=row.count,
            format=plan.formats[0].description,
            kernel=call.kernel if partner else plan.launch(m).kernel,
            n=plan.n,
            k=plan.k,
            m=m,
            weight_bytes=int(ours.bytes),
            fused=times[FUSED],
            dense=times[DENSE],
            # A limit: what else the machine did meanwhile is none.
            read_gbs=read.bytes / times[READ].best_us / 1e3,
            decoding=1 - times[UNDECODED].us / times[ALONE].us if UNDECODED in times else None,
        )


def _linear(plan: LayerPlan, device: torch.device, ablate: bool) -> Sides:
    """Ours, the unquantized layer, and ours without decoding where it is asked for."""
    call = plan.main.call
    weights = cold(packed_for(call, device, plan.ordered))
    both = (fused(call, weights), dense(plan.n, plan.k, call.dtype.torch, device))
    if not ablate:
        return lambda m: both
    return lambda m: (*both, *without_decoding(call, plan.launch(m), weights, m))


def _experts(up: LayerPlan, down: LayerPlan, device: torch.device) -> Sides:
    """Ours and the unquantized experts, by what so many tokens ask of a rank's experts."""
    stacks, shard = stacked_pair(up, down, device), up.shard
    weights = dense_experts(up, down, up.main.call.dtype.torch, device)

    def sides(m: int) -> tuple[Contender, Contender]:
        routing = Routing.uniform(m, min(shard.top_k, shard.count), shard.count, device)
        return fused_experts(up, down, routing, stacks), unquantized_experts(weights, routing)

    return sides
