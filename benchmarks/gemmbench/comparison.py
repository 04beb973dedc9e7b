"""Measures every contender on one weight, for many numbers of tokens, by the same yardsticks."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import (
    GemmShape,
    Launch,
    PackedWeight,
    QuantSpec,
    WeightType,
)
from gemmbench.ablation import ABLATIONS
from gemmbench.answers import Answer
from gemmbench.contender import Contender, Prepared, Unavailable
from gemmbench.libraries import LIBRARIES
from gemmbench.own import OWN, device_spec
from gemmbench.results import Problem, Row
from gemmbench.specialised import SPECIALISED
from gemmbench.triton_kernels import load_only
from gemmbench.vllm_linear import VLLM
from gemmbench.weights import packed_bytes, packed_for_gpu
from vllm_fusedq.measure.random_weights import random_tokens, random_weight
from vllm_fusedq.measure.roofline import rates_for, roofline
from vllm_fusedq.measure.timing import Timing, copies_for, measure

CONTENDERS: tuple[Contender, ...] = (*OWN, *SPECIALISED, *VLLM, *LIBRARIES, *ABLATIONS)
YARDSTICK = "cublas"
TWIN = "load-only"
# Errors after which a CUDA context answers nothing any more. Torch adds advice to every CUDA error,
# which speaks of device-side assertions whatever happened.
_FATAL = ("illegal", "launch failure", "misaligned", "device-side assert triggered")


class DeviceLost(Exception):
    """A kernel broke the CUDA context; the process has to end."""


class Runner(NamedTuple):
    """A contender with copies of one weight, each packed."""

    contender: Contender
    copies: tuple[Prepared, ...]


def available(names: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that load here, and why the others do not, by name.

    `names` selects (all of them if empty); the yardstick always takes part. Raises ValueError for
    an unknown name.
    """
    known = {contender.name: contender for contender in CONTENDERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown contenders {unknown}; known: {', '.join(known)}")
    found, skipped = [], {}
    for name, contender in known.items():
        if names and name not in names and name != YARDSTICK:
            continue
        try:
            contender.version()
            found.append(contender)
        except Unavailable as error:
            skipped[name] = str(error)
    return found, skipped


class CrashMarker:
    """Remembers in a file what was running, so that what killed a run is left out of the next."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def culprit(self) -> str | None:
        """Contender that was running when the last process died, if it did."""
        if not self._path.exists():
            return None
        return json.loads(self._path.read_text())["kernel"]

    def running(self, kernel: str, problem: Problem) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"kernel": kernel, "problem": problem._asdict()}))

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


class Comparison:
    """One weight of shape `[n, k]`, prepared for every contender once and measured for many m."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        n: int,
        k: int,
        spec: QuantSpec,
        act_dtype: torch.dtype,
        device: torch.device,
        marker: CrashMarker,
    ) -> None:
        self._device, self._act_dtype, self._marker = device, act_dtype, marker
        self._logical = random_weight(n, k, spec, device)
        self._bias = random_tokens(1, n, act_dtype, device, seed=2)[0]
        types = (spec.weight_type.value, spec.group_size, DType.of(act_dtype).value)
        self._problem = Problem(*types, n, k, 0)
        self.refused: dict[str, str] = {}
        self._runners = list(self._prepared(contenders))
        self._twins = self._packed_copies()

    def measure(self, m: int) -> list[Row]:
        """A row for each contender that is right, and one without a time for each that is not."""
        problem = self._problem._replace(m=m)
        x = random_tokens(m, problem.k, self._act_dtype, self._device)
        answer = Answer(x, self._logical)
        twin = self._measure_twin(m)
        rows: list[Row] = []
        for runner in self._runners:
            self._marker.running(runner.contender.name, problem)
            rows.append(self._row(runner, x, answer))
        self._marker.clear()
        cublas = next((r["us"] for r in rows if r["kernel"] == YARDSTICK and r["us"]), None)
        for row in rows:
            if row["us"]:
                row["pct_twin"] = _round(100 * twin.us / row["us"], 1) if twin else ""
                row["vs_cublas"] = _round(cublas / row["us"], 3) if cublas else ""
        if twin:
            size = packed_bytes(self._twins[0])
            gbs = size / twin.us / 1e3
            times = {"us": _round(twin.us), "iqr_us": _round(twin.iqr_us)}
            rows.append({"kernel": TWIN, **times, "weight_gbs": _round(gbs, 1), "pct_twin": 100.0})
        return [{**problem._asdict(), **row} for row in rows]

    def _prepared(self, contenders: Sequence[Contender]) -> Iterator[Runner]:
        for contender in contenders:
            self._marker.running(contender.name, self._problem)
            try:
                first = contender.prepare(self._logical, self._act_dtype)
                count = copies_for(first.weight_bytes, self._device)
                more = (contender.prepare(self._logical, self._act_dtype) for _ in range(count - 1))
                yield Runner(contender, (first, *more))
            except Unavailable as error:
                self.refused[contender.name] = str(error)
            except Exception as error:
                _raise_if_fatal(contender.name, error)
                self.refused[contender.name] = f"{type(error).__name__}: {error}"
        self._marker.clear()

    def _row(self, runner: Runner, x: torch.Tensor, answer: Answer) -> Row:
        first = runner.copies[0]
        m, n, k = x.shape[0], self._problem.n, self._problem.k
        row: Row = {"kernel": runner.contender.name, "version": runner.contender.version()}
        try:
            row["detail"] = first.detail(m)
            errors = answer.errors(first.run(x))
            verdict = errors.verdict
            if not verdict and first.with_bias is not None:
                verdict = answer.errors(first.with_bias(x, self._bias), self._bias).verdict
                verdict = verdict and f"with a bias, {verdict}"
            if first.checked and verdict:
                wrong = f"WRONG, not timed: {verdict}"
                return row | {"us": "", "rms_error": f"{errors.rms:.2e}", "detail": wrong}
            # `run` is bound now, not when the graph is captured.
            calls = [lambda run=copy.run: run(x) for copy in runner.copies]
            timing = measure(calls, self._device)
        except Exception as error:
            _raise_if_fatal(runner.contender.name, error)
            return row | {"us": "", "detail": f"FAILED: {type(error).__name__}: {error}"[:300]}
        return row | {
            "us": _round(timing.us),
            "iqr_us": _round(timing.iqr_us),
            "tflops": _round(2 * m * n * k / timing.us / 1e6),
            "weight_gbs": _round(first.weight_bytes / timing.us / 1e3, 1),
            "dram_mb": _round(first.dram_bytes(m) / 1e6),
            "rms_error": f"{errors.rms:.2e}",
            **(self._predicted(m) if runner.contender.name == OWN[0].name else {}),
        }

    def _predicted(self, m: int) -> Row:
        problem = self._problem
        return predict(problem.n, problem.k, m, self._logical.spec, self._device)[0]

    def _packed_copies(self) -> list[PackedWeight]:
        first = packed_for_gpu(self._logical, self._act_dtype)
        count = copies_for(packed_bytes(first), self._device)
        more = (packed_for_gpu(self._logical, self._act_dtype) for _ in range(count - 1))
        return [first, *more]

    def _measure_twin(self, m: int) -> Timing | None:
        problem = self._problem
        tile = predict(problem.n, problem.k, m, self._logical.spec, self._device)[1].tile
        if tile is None:
            return None
        calls = [lambda packed=packed: load_only(packed, tile) for packed in self._twins]
        return measure(calls, self._device)


def predict(n: int, k: int, m: int, spec: QuantSpec, device: torch.device) -> tuple[Row, Launch]:
    """The static roofline of our kernel (microseconds and limiter, or nothing), and its launch."""
    hardware = device_spec(device)
    launch = select(GemmShape(m, n, k), spec, hardware)
    rates = rates_for(hardware)
    if rates is None or launch.tile is None:
        return {}, launch
    found = roofline(GemmShape(m, n, k), spec, hardware, launch.tile, rates)
    return {"model_us": _round(found.seconds * 1e6), "model_limit": found.limiter}, launch


def weight_types(names: Sequence[str]) -> list[WeightType]:
    """Weight types by name. Raises ValueError for an unknown one, naming the known ones."""
    known = [each.value for each in WeightType]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown weight type {name!r}; known: {', '.join(known)}")
    return [WeightType(name) for name in names]


def _raise_if_fatal(name: str, error: Exception) -> None:
    if "CUDA" in str(error) and any(word in str(error) for word in _FATAL):
        raise DeviceLost(f"{name}: {error}") from error


def _round(value: float, digits: int = 3) -> float:
    return round(value, digits)
