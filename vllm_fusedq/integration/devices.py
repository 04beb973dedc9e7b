"""The device that vLLM runs on, as planning describes it."""

import torch
import vllm._custom_ops  # noqa: F401  (registers the CPU operators that planning looks for)
from vllm.platforms import current_platform

from fusedq_kernels.choose.boards import HIP_ARCHES, hip_device
from fusedq_kernels.choose.device import (
    SUPPORTED_DEVICES,
    current_device,
    device_of_capability,
)
from fusedq_kernels.types import DeviceSpec
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.settings import this_cpu


def announced_device() -> DeviceSpec:
    """The device as the API process may know it: CUDA must not be initialised there.

    Raises:
        PreflightError: it is neither a CPU nor a GPU of NVIDIA or AMD, or vLLM finds none that it
            runs on.
    """
    if current_platform.is_unspecified():
        raise PreflightError.single(
            layer="every quantized layer",
            found="no device that this build of vLLM runs on",
            supported=SUPPORTED_DEVICES,
            fix="see that `nvidia-smi` lists a GPU, or install vLLM's CPU build (docs/install.md)",
        )
    if current_platform.is_cpu():
        return this_cpu()
    if current_platform.is_rocm():
        # Which one it is, the workers see
        return hip_device("rocm", HIP_ARCHES[0])
    if not current_platform.is_cuda():
        raise PreflightError.single(
            layer="every quantized layer",
            found=f"a vLLM for {current_platform.device_name}",
            supported=SUPPORTED_DEVICES,
            fix="serve this model without --quantization fusedq",
        )
    capability = current_platform.get_device_capability()
    return device_of_capability(capability.major, capability.minor)


def worker_device() -> DeviceSpec:
    """The device of this worker process."""
    return this_cpu() if current_platform.is_cpu() else current_device(torch.device("cuda"))
