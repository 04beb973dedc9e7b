"""Arrival counters of split-K: which program of a tile is the last one to finish.

Each output tile has one int32 that counts the splits whose partial sum is stored. The program that
makes it complete adds all partial sums in the order of K and sets the counter back to zero, so a
counter is zero before and after every launch and no launch has to clear it.

Several streams: two launches that run at the same time must not count in the same place, and only
launches on one stream never do. So every (device, stream) has a row of its own. Partial sums need
none of this: they are allocated per launch, and PyTorch's allocator hands memory to one stream.

CUDA graphs: a captured launch keeps the row of the stream it was captured on, whichever stream
replays it. Graphs captured on one stream must therefore not be replayed at the same time, which
PyTorch asks already of graphs that share a memory pool. Capturing allocates nothing here: the rows
of a device are allocated and cleared by its first launch, and that may not be a captured one.

Memory pools: a caller may run its first launch inside `torch.cuda.use_mem_pool` (vLLM's sleep mode
does), and may let go of what that pool holds. Whatever fills it again knows nothing of counters,
and a counter that is not zero makes every later sum wrong. Such a pool takes what its own thread
allocates, so the counters are allocated by another one.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from fusedq_kernels.geometry import MAX_TILES

MAX_STREAMS = 64


def arrival_counters(device: torch.device) -> torch.Tensor:
    """int32 `[MAX_TILES]`, all zero, for the current stream of `device`.

    Raises:
        RuntimeError: the first launch on this device is being captured into a CUDA graph, or
            launches came from more than MAX_STREAMS streams.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _row(device, stream)


@functools.cache
def _row(device: torch.device, stream: int) -> torch.Tensor:
    rows, unused = _rows(device)
    index = next(unused, None)
    if index is None:
        raise RuntimeError(
            f"split-K kernels were launched from more than {MAX_STREAMS} streams of {device}; "
            "reuse streams"
        )
    return rows[index]


@functools.cache
def _rows(device: torch.device) -> tuple[torch.Tensor, Iterator[int]]:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first split-K launch on {device} is being captured into a CUDA graph; "
            "run the model once before capturing it"
        )
    with ThreadPoolExecutor(1) as outside:
        rows = outside.submit(_zeros, device).result()
    return rows, iter(range(MAX_STREAMS))


def _zeros(device: torch.device) -> torch.Tensor:
    rows = torch.zeros((MAX_STREAMS, MAX_TILES), dtype=torch.int32, device=device)
    if device.type == "cuda":
        # Another stream may count before this one has cleared.
        torch.cuda.current_stream(device).synchronize()
    return rows
