"""Times the launches worth measuring for a weight, those that are right alone.

Every candidate is first compared with float64, with a bias and without, as a server compares its
launches before it serves; what differs or does not run has no time and says why.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedq_kernels import guard, ops
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.choose.tuned_file import FUSED, SLICED
from fusedq_kernels.layouts.packing import pack, weight_bytes
from fusedq_kernels.types import TILED_LAYOUTS, DeviceSpec, GemmShape, Launch, QuantSpec
from fusedq_kernels.warmup import Reached
from vllm_fusedq.measure.candidates import AUDITED_STAGES, MIN_SLICED_M, Measurement, candidates
from vllm_fusedq.measure.random_weights import random_tokens, random_weight
from vllm_fusedq.measure.roofline import likely_rates
from vllm_fusedq.measure.timing import Call, Timing, copies_for, measure

Measure = Callable[[Sequence[Call], torch.device], Timing]
_WORDS = 200


class Job(NamedTuple):
    """One weight of a rank, and the numbers of tokens that are to be measured."""

    n: int
    k: int
    spec: QuantSpec
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.spec.weight_type.value} g{self.spec.group_size} {self.n}x{self.k}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One launch: its `timing`, or in `note` why it has none."""

    launch: Launch
    timing: Timing | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """The trials of a job with `m` tokens, the rules' own first; `done` of `total` are."""

    job: Job
    m: int
    trials: tuple[Trial, ...]
    done: int
    total: int
    seconds: float

    @property
    def best(self) -> Trial | None:
        """The fastest; None where no launch was right."""
        timed = [trial for trial in self.trials if trial.timing is not None]
        return min(timed, key=lambda trial: trial.timing.us, default=None)

    @property
    def discarded(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.timing is None)

    @property
    def remaining(self) -> float:
        """Seconds that the rest takes at the pace so far."""
        return self.seconds / self.done * (self.total - self.done)

    @property
    def measurements(self) -> list[Measurement]:
        """What rows of a tuned file are made of."""
        shape = GemmShape(self.m, self.job.n, self.job.k)
        return [
            Measurement(shape, self.job.spec, t.launch.tile, t.timing.us, t.launch.kernel)
            for t in self.trials
            if t.timing is not None
        ]


@dataclass(frozen=True, slots=True)
class Tuner:
    """How weights are measured.

    Attributes:
        device: where tensors are; a CPU runs Triton's interpreter.
        hardware: whose tiles are tried.
        act_dtype: of the activations.
        keep: tiles that are tried for a number of tokens; slices through cuBLAS come beside them.
        more_stages: what is added to the stages of the rules' tiles.
        measure: times calls that are equal but for their copy of the weight.
    """

    device: torch.device
    hardware: DeviceSpec
    act_dtype: torch.dtype = torch.bfloat16
    keep: int = 16
    more_stages: Sequence[int] = AUDITED_STAGES
    measure: Measure = measure

    def run(self, jobs: Sequence[Job], seconds: float | None = None) -> Iterator[Measured]:
        """Measure job by job until all are done, or until so many seconds are over."""
        start, total, done = time.monotonic(), sum(len(job.tokens) for job in jobs), 0

        def elapsed() -> float:
            return time.monotonic() - start

        for job in jobs:
            weight = None
            for m in job.tokens:
                if seconds is not None and elapsed() >= seconds:
                    return
                weight = weight or _Weight(job, self)
                trials, done = weight.trials(m), done + 1
                yield Measured(job, m, tuple(trials), done, total, elapsed())


class _Weight:
    """Copies of one packed weight that together exceed L2, and what it gives."""

    def __init__(self, job: Job, tuner: Tuner) -> None:
        self._job, self._tuner = job, tuner
        layout, device = TILED_LAYOUTS[job.spec.weight_type], tuner.device
        logical = random_weight(job.n, job.k, job.spec, device)
        first = pack(logical, layout, tuner.act_dtype)
        count = copies_for(sum(weight_bytes(first).values()), device)
        more = (pack(logical, layout, tuner.act_dtype) for _ in range(count - 1))
        self._copies = [first, *more]
        self._truth = guard.Truth.of(first, tuner.act_dtype)

    def trials(self, m: int) -> Iterator[Trial]:
        """A trial per candidate."""
        job, tuner = self._job, self._tuner
        x = random_tokens(m, job.k, tuner.act_dtype, tuner.device)
        shape, rates = GemmShape(m, job.n, job.k), likely_rates(tuner.hardware)
        tiles = candidates(shape, job.spec, tuner.hardware, rates, tuner.keep, tuner.more_stages)
        launches = [Launch(FUSED, tile, "candidate") for tile in tiles]
        if m >= MIN_SLICED_M:
            launches.append(Launch(SLICED, None, "candidate"))
        return (self._trial(launch, x) for launch in launches)

    def _trial(self, launch: Launch, x: torch.Tensor) -> Trial:
        try:
            for has_bias in (True, False):
                reached = Reached(launch, x.shape[0], has_bias)
                kernel = KERNELS[launch.kernel]
                if found := guard.check(reached, kernel, self._copies[0], self._truth):
                    return Trial(launch, note=f"WRONG: {found}"[:_WORDS])
            calls = [
                lambda packed=packed: ops.run(x, packed, None, launch) for packed in self._copies
            ]
            return Trial(launch, self._tuner.measure(calls, self._tuner.device))
        except Exception as error:
            # Too much shared memory, for one; a broken CUDA context fails every later trial as well
            return Trial(launch, note=f"FAILED: {type(error).__name__}: {error}"[:_WORDS])
