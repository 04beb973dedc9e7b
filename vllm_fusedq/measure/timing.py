"""Times of short calls that find their weight in no cache, medians and spread.

Walking over copies of the weight that together exceed the last cache makes every call read its
weight from memory, as serving does. On a GPU calls are timed in CUDA graphs, which removes the
launch gaps that would hide small kernels; on a CPU those that are compared run by turns, so that
whatever slows the machine slows all alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]

_L2_MULTIPLE = 4
_MAX_COPIES = 64
_MIN_CALLS_PER_GRAPH = 32
_MIN_ROUNDS = 3
_MIN_REPLAYS, _MAX_REPLAYS, _TARGET_MS = 10, 30, 60.0


class Timing(NamedTuple):
    """Microseconds per call: median, interquartile range and best of `samples`."""

    us: float
    iqr_us: float
    samples: int
    best_us: float


def copies_for(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight it takes to walk over `_L2_MULTIPLE` times the L2 cache."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_COPIES, max(1, -(-_L2_MULTIPLE * l2 // max(1, weight_bytes))))


def by_turns(
    contenders: Mapping[str, Sequence[Call]], rounds: int, seconds: float = math.inf
) -> dict[str, Timing]:
    """Times of calls on a CPU, all contenders in each round, each with its next copy of the weight.

    Args:
        contenders: by name, calls that are equal but for their copy.
        rounds: at most; the first, which is not counted, touches everything once.
        seconds: after so many no round begins, but at least `_MIN_ROUNDS` are done.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for calls in contenders.values():
        calls[0]()
    began = time.perf_counter()
    for round_ in range(1, rounds + 1):
        for name, calls in contenders.items():
            start = time.perf_counter()
            calls[round_ % len(calls)]()
            times[name].append((time.perf_counter() - start) * 1e6)
        if round_ >= _MIN_ROUNDS and time.perf_counter() - began > seconds:
            break
    return {name: summary(found) for name, found in times.items()}


def measure(calls: Sequence[Call], device: torch.device) -> Timing:
    """Time per call of `calls`, run in order; each uses its own copy of the weight."""
    return _measure_cuda(calls) if device.type == "cuda" else _measure_cpu(calls)


def _measure_cpu(calls: Sequence[Call]) -> Timing:
    """For dry runs: it proves the path, its times mean nothing."""
    start = time.perf_counter()
    for call in calls:
        call()
    return summary([(time.perf_counter() - start) * 1e6 / len(calls)])


def _measure_cuda(calls: Sequence[Call]) -> Timing:
    for call in calls[:2]:
        call()
        call()
    rounds = -(-_MIN_CALLS_PER_GRAPH // len(calls))
    graph = _capture(list(calls) * rounds)
    first = _replay_ms(graph, 2)[-1]
    replays = max(_MIN_REPLAYS, min(_MAX_REPLAYS, int(_TARGET_MS / max(first, 1e-3))))
    per_call = 1e3 / (rounds * len(calls))
    return summary([ms * per_call for ms in _replay_ms(graph, replays)])


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    # By hand: `torch.cuda.graph` collects garbage every time, longer than a whole measurement.
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # On the stream of the capture, so that what a kernel allocates per stream exists by then.
        calls[0]()
        stream.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(replays)
    ]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def summary(times: Sequence[float]) -> Timing:
    """Median and interquartile range of at least one time."""
    if len(times) < 2:
        return Timing(times[0], 0.0, len(times), times[0])
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), high - low, len(times), min(times))
