"""Devices: a table of known GPUs for planning without one, and the only `torch.cuda` queries.

`heuristics.py` decides from a `DeviceSpec` alone and never asks a driver.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import replace

from fusedq_kernels.choose.boards import BOARDS, hip_device
from fusedq_kernels.lazy import torch
from fusedq_kernels.native.build import available
from fusedq_kernels.native.isa import this_isa
from fusedq_kernels.types import DeviceSpec

MIN_CAPABILITY = (8, 0)
KNOWN_DEVICES = {
    name: board.device for name, board in BOARDS.items() if board.capability >= MIN_CAPABILITY
}
MEMORY_BYTES = {name: board.memory_bytes for name, board in BOARDS.items()}
"""Memory of the boards, of those that are too old as well."""

SUPPORTED_DEVICES = "NVIDIA GPUs of compute capability {}.{} and newer, and CPUs".format(
    *MIN_CAPABILITY
)


def device_by_name(name: str) -> DeviceSpec:
    """A known device by name ("h200") or architecture ("sm_90", sized as its first known device).

    What is too old, or runs by consent only, is known too, for the plan to refuse it. Raises
    ValueError naming those that run.
    """
    if name in BOARDS:
        return BOARDS[name].device
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

    A GPU gets a name of `BOARDS` where it is that very board, else one derived from the
    name its driver reports. Raises ValueError for a device that is neither CPU nor CUDA.
    """
    if device.type == "cpu":
        return cpu_device()
    if device.type != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device}")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return hip_device(arch, arch, properties.multi_processor_count)
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

    Without a driver there is no GPU, which is known two seconds before torch says it.
    """
    if not any(map(_loads, ("libcuda.so.1", "libamdhip64.so"))):
        return None
    if not torch.cuda.is_available():
        return None
    gpu = torch.device("cuda")
    return current_device(gpu), torch.cuda.get_device_properties(gpu).total_memory


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _driver_words(driver_name: str) -> str:
    """The words of the name that a driver reports, each between spaces."""
    words = re.sub(r"[^a-z0-9]+", " ", driver_name.lower()).replace("rtx ", "rtx")
    return f" {words.strip()} "


def _device_name(driver_name: str, spec: DeviceSpec) -> str:
    words = _driver_words(driver_name)
    for board in BOARDS.values():
        if f" {board.driver or board.name} " in words and replace(board.device, name="") == spec:
            return board.name
    return "-".join(word for word in words.split() if word not in ("nvidia", "geforce"))
