"""Checks of the fused kernel on the device that is here: right, repeatable, batch-invariant.

Every check raises AssertionError with what was found, or returns a sentence for the report.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from fusedq_kernels import guard, ops, reference
from fusedq_kernels.choose.heuristics import select, tiles_for
from fusedq_kernels.choose.slices import slice_rows
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import round_up
from fusedq_kernels.layouts.packing import count_groups, group_geometry
from fusedq_kernels.types import (
    GemmShape,
    Launch,
    LogicalWeight,
    Policy,
    QuantSpec,
    TileConfig,
    WeightType,
)
from gemmbench.own import device_spec
from gemmbench.weights import default_spec, packed_for_gpu
from vllm_fusedq.measure.random_weights import random_tokens, random_weight

KERNEL = "triton-gemm"
SLICED = Launch("sliced-cublas", None, "check")
# RMS error over the RMS of the answer. Rounding y to 16 bits costs 1.65e-3 (bf16) and 2.1e-4 (fp16)
# RMS; weights scaled in 16 bits add 1.4e-3 and 1.8e-4. The bound of each output is the guard's.
_RMS_BOUND = {torch.bfloat16: 2.2e-3, torch.float16: 2.8e-4}
_RMS_BOUND_SCALED = {torch.bfloat16: 3.2e-3, torch.float16: 4.0e-4}
_TOKENS = 1024


@dataclass(frozen=True)
class Case:
    """One weight on which kernels are checked."""

    n: int
    k: int
    spec: QuantSpec
    act_dtype: torch.dtype
    phase: int = 0

    @property
    def name(self) -> str:
        spec, dtype = self.spec, DType.of(self.act_dtype)
        phase = f" phase {self.phase}" if self.phase else ""
        return f"{spec.weight_type.value} g{spec.group_size} {dtype} {self.n}x{self.k}{phase}"


class Subject:
    """A weight of a case, packed, with its float64 value and a bias."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        logical = random_weight(case.n, case.k, case.spec, device)
        if case.phase:
            logical = _shifted(logical, case.phase)
        self.packed = packed_for_gpu(logical, case.act_dtype)
        self.weight = reference.dequantize(logical, case.act_dtype).double()
        self.bias = random_tokens(1, case.n, case.act_dtype, device, seed=2)[0]

    def launch(self, m: int, *, batch_invariant: bool = False) -> Launch:
        """What `select` gives for `m` tokens."""
        shape = GemmShape(m, self.case.n, self.case.k)
        hardware = device_spec(self.device)
        return select(shape, self.case.spec, hardware, policy=Policy(batch_invariant))

    def launches(self, m: int) -> Iterator[Launch]:
        """The selected launch, then every other tile of the rules that can take `m` tokens."""
        chosen = self.launch(m)
        yield chosen
        step = group_geometry(self.case.k, self.case.spec.group_size, self.case.phase).step
        for tile in tiles_for(device_spec(self.device), self.case.spec.weight_type, step):
            if round_up(self.case.n, 128) % tile.block_n == 0 and tile.block_m <= max(8, 2 * m):
                for split_k in {1, min(4, -(-self.case.k // 128))}:
                    split = replace(tile, split_k=split_k)
                    if split != chosen.tile:
                        yield Launch(KERNEL, split, "check")

    def run(self, x: torch.Tensor, launch: Launch, has_bias: bool = True) -> torch.Tensor:
        """y of one launch, from memory that held NaN before."""
        n, k = self.case.n, self.case.k
        shapes = ((x.shape[0], n), (slice_rows(n, k), k))
        poison = [x.new_full(shape, torch.nan) for shape in shapes]
        del poison
        return ops.run(x, self.packed, self.bias if has_bias else None, launch)

    def tokens(self, m: int) -> torch.Tensor:
        return random_tokens(m, self.case.k, self.case.act_dtype, self.device)


def check_right(subject: Subject, m: int, every_tile: bool) -> str:
    """Against float64 on all outputs, for the selected launch or every tile."""
    return _check_launches(subject, m, subject.launches(m) if every_tile else [subject.launch(m)])


def check_sliced(subject: Subject, m: int, runs: int) -> str:
    """The sliced kernel against float64, and from a CUDA graph what it gives without one."""
    found = _check_launches(subject, m, [SLICED])
    if subject.device.type == "cuda":
        x = subject.tokens(m)
        _check_graph(subject, x, SLICED, subject.run(x, SLICED), runs)
    return found


def _check_launches(subject: Subject, m: int, launches: Iterable[Launch]) -> str:
    x = subject.tokens(m)
    truths = [
        guard.Truth.of_tokens(part, subject.bias, [subject.weight]) for part in x.split(_TOKENS)
    ]
    worst, count = 0.0, 0
    for launch in launches:
        for has_bias in (False, True):
            y = subject.run(x, launch, has_bias)
            worst = max(worst, _check_outputs(y, has_bias, launch, truths))
        count += 1
    return f"M={m}: {count} launches with and without a bias, RMS error at most {worst:.2e}"


def _check_outputs(
    y: torch.Tensor, has_bias: bool, launch: Launch, truths: list[guard.Truth]
) -> float:
    """RMS error of all outputs; AssertionError where it is too large, or one output is wrong."""
    squares = size = wrong = 0
    for part, truth in zip(y.split(_TOKENS), truths, strict=True):
        expected = truth.sums + truth.bias.double() if has_bias else truth.sums
        allowed = guard.tolerance(launch, truth, expected, y.numel(), truth.x.shape[1])
        error = part.double() - expected
        wrong += int((~(error.abs() <= allowed)).sum())
        squares += error.square().sum().item()
        size += expected.square().sum().item()
    rms, bound = (squares / size) ** 0.5, _rms_bound(launch.tile, y.dtype)
    where = f"M={len(y)} {launch}, {'a' if has_bias else 'no'} bias"
    found = f"{where}: {wrong} of {y.numel()} outputs wrong, RMS error {rms:.2e}, bound {bound:.1e}"
    assert rms <= bound, found
    assert not wrong, found
    return rms


def check_repeatable(subject: Subject, m: int, runs: int) -> str:
    """The same bits on every run, alone, on two streams at once, and from a CUDA graph."""
    x, launch = subject.tokens(m), subject.launch(m)
    first = subject.run(x, launch)
    for index in range(runs):
        assert torch.equal(subject.run(x, launch), first), f"M={m}: run {index} differs"
    if subject.device.type != "cuda":
        return f"M={m}: {runs} runs equal"
    _check_streams(subject, x, launch, first, runs)
    _check_graph(subject, x, launch, first, runs)
    return f"M={m}: {runs} runs, {runs} on two streams, {runs} of a graph: equal"


def check_batch_invariant(subject: Subject, tokens: list[int]) -> str:
    """A row's bits are the same in every batch and at every place in it, in that mode."""
    largest = max(tokens)
    x = subject.tokens(largest)
    expected = subject.run(x, subject.launch(largest, batch_invariant=True))
    for m in tokens:
        launch = subject.launch(m, batch_invariant=True)
        for start in {0, largest - m}:
            part = x[start : start + m].contiguous()
            y = subject.run(part, launch)
            differs = (y != expected[start : start + m]).sum().item()
            assert not differs, f"M={m} at {start}, {launch}: {differs} outputs differ"
    return f"{len(tokens)} batch sizes up to {largest}: equal"


def cases(shapes: list[tuple[int, int]], small: bool) -> Iterator[Case]:
    """Every weight type, group size and dtype on every shape; shards that begin inside a group."""
    groups = (None, 32) if small else (None, 32, 64, 256, -1)
    for n, k in shapes:
        for weight_type in WeightType:
            for group in groups:
                for act_dtype in (torch.bfloat16, torch.float16):
                    spec = default_spec(weight_type, group, k, act_dtype)
                    yield Case(n, k, spec, act_dtype)
        spec = default_spec(WeightType.UINT4, 128, k, torch.bfloat16)
        yield Case(n, k, spec, torch.bfloat16, phase=80)


def _shifted(logical: LogicalWeight, phase: int) -> LogicalWeight:
    """The same codes as a shard whose first row is row `phase` of its group."""
    groups = count_groups(logical.codes.shape[1], logical.spec.group_size, phase)
    # One group more than without a phase, if any: repeat the last.
    index = torch.arange(groups, device=logical.codes.device)
    index = index.clamp(max=logical.scales.shape[1] - 1)
    zeros = None if logical.zeros is None else logical.zeros[:, index]
    return replace(logical, scales=logical.scales[:, index], zeros=zeros, phase=phase)


def _rms_bound(tile: TileConfig | None, act_dtype: torch.dtype) -> float:
    exact = tile is not None and not tile.scale_weights
    return (_RMS_BOUND if exact else _RMS_BOUND_SCALED)[act_dtype]


def _check_streams(
    subject: Subject, x: torch.Tensor, launch: Launch, first: torch.Tensor, runs: int
) -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for index in range(runs):
        with torch.cuda.stream(streams[index % 2]):
            results.append(subject.run(x, launch))
    torch.cuda.synchronize()
    for index, y in enumerate(results):
        assert torch.equal(y, first), f"run {index} on two streams differs"


def _check_graph(
    subject: Subject, x: torch.Tensor, launch: Launch, first: torch.Tensor, runs: int
) -> None:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        subject.run(x, launch)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = ops.run(x, subject.packed, subject.bias, launch)
    for index in range(runs):
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, first), f"replay {index} of a graph differs"
