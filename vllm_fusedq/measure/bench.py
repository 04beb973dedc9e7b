"""Every kind of layer of a plan at several numbers of tokens, on this machine, weights random."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fusedq_kernels.catalogue import Op
from vllm_fusedq.measure.contenders import (
    DENSE,
    FUSED,
    READ,
    dense,
    fused,
    packed_for,
    reading,
    timed,
)
from vllm_fusedq.measure.random_weights import random_tokens
from vllm_fusedq.measure.timing import Timing
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.report.table import PlanRow, plan_rows

TOKENS = (1, 4, 16, 64, 256, 2048)
ROUNDS = 15
# On a CPU no round begins after so long, for one layer and number of tokens
SECONDS = 3.0
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One kind of layer with M tokens; `layers` and `count` are the plan's, sizes those of a rank.

    `weight_bytes` is what one call reads of the weight, metadata included; `read_gbs` what the
    device reads in the same rounds.
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
    """All measured layers of the model with M tokens, in microseconds."""

    m: int
    fused_us: float
    dense_us: float
    weight_bytes: int


@dataclass(frozen=True)
class Bench:
    """`skipped` layers are no single product: experts, and rows that are looked up."""

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
            )
            for m, rows in found.items()
        )


def bench(
    plans: Sequence[LayerPlan],
    tokens: Sequence[int],
    device: torch.device,
    device_name: str,
    on_progress: OnProgress,
    rounds: int = ROUNDS,
) -> Bench:
    """Time every distinct layer of `plans` beside the unquantized one and beside plain reading."""
    rows = plan_rows(plans)
    products = [row for row in rows if _is_product(row.plan)]
    skipped = tuple(row.name for row in rows if not _is_product(row.plan))
    found: list[Row] = []
    known: dict[object, list[Row]] = {}
    total = len(products) * len(tokens)
    for row in products:
        # Layers of another name may be of the same kind
        kind = row.plan.use(Op.MATMUL).call.text, row.plan.ordered
        if kind not in known:
            known[kind] = []
            for each in _measure(row, tokens, device, rounds):
                known[kind].append(each)
                on_progress(len(found) + len(known[kind]), total)
        named = {"layers": row.name, "count": row.count}
        found += [replace(each, **named) for each in known[kind]]
        on_progress(len(found), total)
    dtype = plans[0].main.call.dtype.value
    return Bench(device_name, dtype, tuple(found), skipped)


def _is_product(plan: LayerPlan) -> bool:
    return plan.experts is None and plan.use(Op.MATMUL) is not None


def _measure(
    row: PlanRow, tokens: Sequence[int], device: torch.device, rounds: int
) -> Iterator[Row]:
    plan = row.plan
    call = plan.use(Op.MATMUL).call
    dtype = call.dtype.torch
    packed = packed_for(call, device, plan.ordered)
    ours = fused(call, packed)
    read = reading(device)
    contenders = (read, dense(plan.n, plan.k, dtype, device), ours)
    for m in tokens:
        x = random_tokens(m, call.in_features, dtype, device)
        times = timed(contenders, x, plan.n, rounds, SECONDS)
        yield Row(
            layers=row.name,
            count=row.count,
            format=plan.formats[0].description,
            kernel=plan.use(Op.MATMUL).launch(m).kernel,
            n=plan.n,
            k=plan.k,
            m=m,
            weight_bytes=int(ours.bytes),
            fused=times[FUSED],
            dense=times[DENSE],
            read_gbs=read.bytes / times[READ].us / 1e3,
        )
