"""Which problems no kernel runs, and why: what a plan refuses, before a weight is read.

Pure functions of plain data; `heuristics.py` chooses for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedq_kernels.choose.heuristics import kernel_for
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.types import DeviceSpec, GatherName, KernelName, QuantSpec, Reason

if TYPE_CHECKING:
    import torch

ACT_DTYPES = (DType.FLOAT16, DType.BFLOAT16)

_SCALE_DTYPES = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32)
_MIN_CAPABILITY = (8, 0)
_ANY_GROUP = (KernelName.CPU_STRIPED, GatherName.CPU_GATHER)
_MIN_STEP = 8

_RESHARD = "choose another tensor-parallel size, or leave this layer unquantized"
_REGROUP = "choose another tensor-parallel size, or quantize the model with another group size"


def device_reasons(device: DeviceSpec, act_dtype: DType | torch.dtype) -> tuple[Reason, ...]:
    """Every reason why this device runs no layer at all, with activations of this dtype."""
    reasons = []
    if DType.of(act_dtype) not in ACT_DTYPES:
        found, fix = f"activations in {DType.of(act_dtype)}", "run in one of these (--dtype)"
        reasons.append(Reason(found, ", ".join(ACT_DTYPES), fix))
    if device.kind == "cuda" and device.capability < _MIN_CAPABILITY:
        capability, needed = ("{}.{}".format(*c) for c in (device.capability, _MIN_CAPABILITY))
        board = f"{device.name} of compute capability {capability}"
        reasons.append(Reason(board, f"{needed} and newer", "use a newer GPU, or a CPU"))
    return tuple(reasons)


def unsupported_reasons(
    n: int,
    k: int,
    spec: QuantSpec,
    phase: int,
    device: DeviceSpec,
    gather: GatherName | None = None,
) -> tuple[Reason, ...]:
    """Every reason of its own why a layer cannot run fused on a device that runs others.

    Args:
        n, k: out_features and in_features that one rank holds.
        spec: the layer's scheme.
        phase: position of the rank's first input feature within its group.
        device: where it would run; without `device_reasons`.
        gather: where rows are looked up and never multiplied, by what.

    Raises:
        ValueError: `k` or `phase` is no valid size (see `geometry.count_groups`).
    """
    kernel = gather or kernel_for(device, spec.weight_type)
    reasons = []
    if n % 8 and gather is None:
        reasons.append(Reason(f"{n} out_features per rank", "multiples of 8", _RESHARD))
    if k % 16 and gather is None:
        reasons.append(Reason(f"{k} in_features per rank", "multiples of 16", _RESHARD))
    reasons += _scale_reasons(spec, kernel)
    reasons += _group_reasons(k, spec, phase, kernel)
    return tuple(reasons)


def _scale_reasons(spec: QuantSpec, kernel: KernelName | GatherName) -> list[Reason]:
    supported = _SCALE_DTYPES
    if spec.has_zero_points and kernel is not KernelName.CPU_WNA16:
        # P4 keeps scale and zero point in one 32-bit word.
        supported = (DType.FLOAT16, DType.BFLOAT16)
    if spec.scale_dtype in supported:
        return []
    beside = " beside zero points" if spec.has_zero_points else ""
    fix = "quantize the model again with scales in one of these, loaded in that dtype"
    return [Reason(f"scales in {spec.scale_dtype}{beside}", ", ".join(supported), fix)]


def _group_reasons(
    k: int, spec: QuantSpec, phase: int, kernel: KernelName | GatherName
) -> list[Reason]:
    geometry = group_geometry(k, spec.group_size, phase)
    if geometry.num_groups == 1 or kernel in _ANY_GROUP:
        return []
    if kernel is KernelName.CPU_WNA16:
        if spec.group_size % 2:
            supported = "even group sizes, or one group for all in_features of the rank"
            return [Reason(f"group_size {spec.group_size}", supported, _REGROUP)]
        return []
    reasons = []
    if spec.group_size % _MIN_STEP:
        supported = f"multiples of {_MIN_STEP}, or one group for all in_features of the rank"
        reasons.append(Reason(f"group_size {spec.group_size}", supported, _REGROUP))
    # A step of 8 needs no padding in front; any other is padded, by whole 16-byte loads of x.
    unit = _MIN_STEP if geometry.step <= _MIN_STEP else 16
    if phase % unit:
        found = f"a rank that starts {phase} in_features into a group"
        reasons.append(Reason(found, f"multiples of {unit}", _REGROUP))
    return reasons
