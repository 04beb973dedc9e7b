"""Why a kernel does not run a layer: what a plan refuses, before a weight is read.

Pure functions of plain data. `catalogue.refusals` puts them together for a kernel, and each kernel
names those of its own.
"""

from __future__ import annotations

from fusedq_kernels.call import ACT_DTYPES, FLOAT_SCALES, SCALED_BY_ROWS, SCALES_OF
from fusedq_kernels.choose.boards import HIP_ARCHES
from fusedq_kernels.choose.device import MIN_CAPABILITY
from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import count_groups, group_geometry
from fusedq_kernels.types import DeviceSpec, QuantSpec, Reason

_MIN_STEP = 8

_RESHARD = "choose another tensor-parallel size, or leave this layer unquantized"
_REGROUP = "choose another tensor-parallel size, or quantize the model with another group size"


def of_sizes(n: int, k: int) -> tuple[Reason, ...]:
    """Against the `n` out_features and `k` in_features that a rank multiplies by."""
    reasons = []
    if n % 8:
        reasons.append(Reason(f"{n} out_features per rank", "multiples of 8", _RESHARD))
    if k % 16:
        reasons.append(Reason(f"{k} in_features per rank", "multiples of 16", _RESHARD))
    return tuple(reasons)


def of_device(device: DeviceSpec, act_dtype: DType) -> tuple[Reason, ...]:
    """Against a device as a whole, and the activations' dtype."""
    reasons = []
    if act_dtype not in ACT_DTYPES:
        found, fix = f"activations in {act_dtype}", "run in one of these (--dtype)"
        reasons.append(Reason(found, ", ".join(ACT_DTYPES), fix))
    if device.kind == "cuda" and device.capability < MIN_CAPABILITY:
        capability, needed = ("{}.{}".format(*c) for c in (device.capability, MIN_CAPABILITY))
        board = f"{device.name} of compute capability {capability}"
        reasons.append(Reason(board, f"{needed} and newer", "use a newer GPU, or a CPU"))
    if device.kind == "hip" and device.arch not in HIP_ARCHES:
        found, fix = f"AMD {device.arch}", "use another device"
        reasons.append(Reason(found, f"of AMD's GPUs {', '.join(HIP_ARCHES)}", fix))
    return tuple(reasons)


def of_scales(spec: QuantSpec, supported: tuple[DType, ...] = FLOAT_SCALES) -> tuple[Reason, ...]:
    """Against scales in another dtype than those that are `supported`."""
    if spec.scale_dtype in supported:
        return ()
    beside = " beside zero points" if spec.has_zero_points else ""
    fix = "quantize the model again with scales in one of these, loaded in that dtype"
    return (Reason(f"scales in {spec.scale_dtype}{beside}", ", ".join(supported), fix),)


def of_tiled_scales(spec: QuantSpec) -> tuple[Reason, ...]:
    """A tiled layout keeps scale and zero point in one 32-bit word."""
    reasons = of_scales(spec, SCALES_OF[spec.weight_type])
    if spec.row_scaled != (spec.scale_dtype in SCALED_BY_ROWS):
        found = f"{'a' if spec.row_scaled else 'no'} scale of each row beside {spec.scale_dtype}"
        supported = f"one beside {', '.join(SCALED_BY_ROWS)} alone, and always there"
        reasons += (Reason(found, supported, "convert the checkpoint again, with this version"),)
    return reasons


def of_tensor_core_groups(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Against groups and phases whose steps are finer than the Triton kernels take."""
    geometry = group_geometry(k, spec.group_size, phase)
    if geometry.num_groups == 1:
        return ()
    reasons = []
    if spec.group_size % _MIN_STEP:
        supported = f"multiples of {_MIN_STEP}, or one group for all in_features of the rank"
        reasons.append(Reason(f"group_size {spec.group_size}", supported, _REGROUP))
    # A step of 8 needs no padding in front; any other is padded, by whole 16-byte loads of x.
    unit = _MIN_STEP if geometry.step <= _MIN_STEP else 16
    if phase % unit:
        found = f"a rank that starts {phase} in_features into a group"
        reasons.append(Reason(found, f"multiples of {unit}", _REGROUP))
    return tuple(reasons)


def of_odd_groups(k: int, spec: QuantSpec, phase: int) -> tuple[Reason, ...]:
    """Against several groups of an odd size."""
    if count_groups(k, spec.group_size, phase) == 1 or spec.group_size % 2 == 0:
        return ()
    supported = "even group sizes, or one group for all in_features of the rank"
    return (Reason(f"group_size {spec.group_size}", supported, _REGROUP),)
