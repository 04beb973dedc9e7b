"""Devices: a table of known GPUs for planning without one, and the only `torch.cuda` queries.

`heuristics.py` decides from a `DeviceSpec` alone and never asks a driver.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import replace

from fusedq_kernels.lazy import torch
from fusedq_kernels.native.build import available
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import DeviceSpec

_KIB = 1024
# Largest shared memory one block may opt in to (CUDA C programming guide, compute capabilities).
_SMEM_PER_BLOCK = {
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
}


def _gpu(name: str, capability: tuple[int, int], num_sms: int) -> DeviceSpec:
    return DeviceSpec(name, "cuda", capability, num_sms, _SMEM_PER_BLOCK[capability])


# SXM variants where a name covers several boards; the first of a capability stands for "sm_XX".
KNOWN_DEVICES: dict[str, DeviceSpec] = {
    device.name: device
    for device in (
        _gpu("a100", (8, 0), 108),
        _gpu("a10", (8, 6), 72),
        _gpu("rtx3090", (8, 6), 82),
        _gpu("l40s", (8, 9), 142),
        _gpu("l4", (8, 9), 58),
        _gpu("rtx4090", (8, 9), 128),
        _gpu("h100", (9, 0), 132),
        _gpu("h200", (9, 0), 132),
        _gpu("b200", (10, 0), 148),
        _gpu("rtx5090", (12, 0), 170),
    )
}


_MIB = 1 << 20
MEMORY_BYTES = {
    "a100": 81920 * _MIB,
    "a10": 23028 * _MIB,
    "rtx3090": 24576 * _MIB,
    "l40s": 46068 * _MIB,
    "l4": 23034 * _MIB,
    "rtx4090": 24564 * _MIB,
    "h100": 81559 * _MIB,
    "h200": 143771 * _MIB,
    "b200": 183359 * _MIB,
    "rtx5090": 32607 * _MIB,
}
"""Memory of the known devices as `nvidia-smi` reports it; of an A100 the 80 GB board's."""

SUPPORTED_DEVICES = "NVIDIA GPUs of compute capability 8.0 and newer, and CPUs"
UNSUPPORTED_DEVICES = {
    "mi300x": ("AMD gfx942", SUPPORTED_DEVICES),
}
"""Devices that are refused by name: what they are, what is supported."""


def device_by_name(name: str) -> DeviceSpec:
    """A known device by name ("h200") or architecture ("sm_90", sized as its first known device).

    Raises ValueError naming the known devices.
    """
    if name in KNOWN_DEVICES:
        return KNOWN_DEVICES[name]
    by_arch: dict[str, DeviceSpec] = {}
    for device in KNOWN_DEVICES.values():
        by_arch.setdefault("sm_{}{}".format(*device.capability), device)
    if name in by_arch:
        return replace(by_arch[name], name=name)
    known = ", ".join((*KNOWN_DEVICES, *by_arch))
    raise ValueError(f"unknown device {name!r}; known devices: {known}")


def device_of_capability(major: int, minor: int) -> DeviceSpec:
    """The architecture of a GPU of which nothing else is known, "sm_90" for 9.0.

    It has the size of its first known device, or none: enough to say what is supported there.
    """
    name = f"sm_{major}{minor}"
    known = (device for device in KNOWN_DEVICES.values() if device.capability == (major, minor))
    like = next(known, DeviceSpec(name, "cuda", (major, minor)))
    return replace(like, name=name)


@functools.cache
def cpu_device() -> DeviceSpec:
    """This machine's CPU, without torch; raises ValueError as `isa.this_isa` does."""
    isa = this_isa()
    return DeviceSpec("cpu", "cpu", cpu_isa=isa.name if available(isa) else "")


def current_device(device: torch.device) -> DeviceSpec:
    """The device behind a `torch.device`.

    A GPU gets a name of `KNOWN_DEVICES` where it is that very board, else one derived from the
    name its driver reports. Raises ValueError for a device that is neither CPU nor CUDA.
    """
    if device.type == "cpu":
        return cpu_device()
    if device.type != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device}")
    properties = torch.cuda.get_device_properties(device)
    spec = DeviceSpec(
        name="",
        kind="cuda",
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        smem_per_block=properties.shared_memory_per_block_optin,
    )
    return replace(spec, name=_device_name(properties.name, spec))


@functools.cache
def device_behind(device: torch.device, on_cpu: bool) -> DeviceSpec:
    """What a kernel runs on whose tensors are there; `on_cpu` says that it is one of a CPU's.

    On CPU tensors Triton runs in its interpreter, which stands in for a GPU and needs a tile.
    """
    if device.type == "cpu" and not on_cpu:
        return device_by_name("sm_90")
    return current_device(device)


def current_gpu() -> tuple[DeviceSpec, int] | None:
    """The first GPU and its memory in bytes, None without one; torch is asked only if it may help.

    Without NVIDIA's driver there is no GPU, which is known two seconds before torch says it.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if not torch.cuda.is_available():
        return None
    gpu = torch.device("cuda")
    return current_device(gpu), torch.cuda.get_device_properties(gpu).total_memory


def _driver_words(driver_name: str) -> list[str]:
    """The words of the name that a driver reports; among them may be one of `KNOWN_DEVICES`."""
    return re.sub(r"[^a-z0-9]+", " ", driver_name.lower()).replace("rtx ", "rtx").split()


def _device_name(driver_name: str, spec: DeviceSpec) -> str:
    words = _driver_words(driver_name)
    for word in words:
        known = KNOWN_DEVICES.get(word)
        if known is not None and replace(known, name="") == spec:
            return word
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))
