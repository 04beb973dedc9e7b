"""Times of short calls: CUDA graphs over buffers that L2 cannot hold, medians and spread.

A graph removes the launch gaps that would hide small kernels; walking over copies of the weight
that together exceed L2 several times makes every call read its weight from HBM, as serving does.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]

_L2_MULTIPLE = 4
_MAX_COPIES = 64
_MIN_CALLS_PER_GRAPH = 32
_MIN_REPLAYS, _MAX_REPLAYS, _TARGET_MS = 10, 30, 60.0


class Timing(NamedTuple):
    """Microseconds per call: median, and interquartile range, over `samples` replays."""

    us: float
    iqr_us: float
    samples: int


def copies_for(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight it takes to walk over `_L2_MULTIPLE` times the L2 cache."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_COPIES, max(1, -(-_L2_MULTIPLE * l2 // max(1, weight_bytes))))


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
        return Timing(times[0], 0.0, len(times))
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), high - low, len(times))
