"""What a measurement calls the machine that it ran on."""

import platform
from pathlib import Path

import torch

from fusedq_kernels.choose.device import cpu_device


def describe(device: torch.device) -> str:
    """A GPU's name, or a CPU's model with its threads and instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), "")
    name = model.partition(": ")[2] or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {cpu_device().cpu_isa}"
