"""What torch allocates while something runs."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def peak_of(work: Callable[[], Result], source: Path | None = None) -> tuple[Result, int]:
    """The result, and the most bytes that torch's CPU allocator held for it at any time.

    torch reports the mapping of a file, here the weights in `source`, like an allocation.
    """
    mapped = source and (source / "model.safetensors").stat().st_size
    with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profile:
        result = work()
    found = profile.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    events = [event for event in events if abs(event.nbytes()) != mapped]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak
