"""The nouns of the kernel library: weight types, problem shapes, devices, launches, weights.

Plain frozen data. `layout.py` turns a `LogicalWeight` into a `PackedWeight`, `heuristics.py` picks
a `Launch`, `op.py` runs it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch


class WeightType(Enum):
    """How a stored code becomes a value, under the field's names (vLLM `scalar_types`).

    `uint4` and `uint8` are unsigned codes with an explicit zero point per group, `uint4b8` and
    `uint8b128` unsigned codes with the constant zero points 8 and 128: a signed integer is stored
    as the code that lies its zero point higher.
    """

    UINT4 = "uint4"
    UINT4B8 = "uint4b8"
    UINT8 = "uint8"
    UINT8B128 = "uint8b128"

    @property
    def bits(self) -> int:
        return _WEIGHT_TYPE_BITS[self]

    @property
    def bias(self) -> int | None:
        """Constant zero point, or None where each group stores its own."""
        return _WEIGHT_TYPE_BIAS[self]


_WEIGHT_TYPE_BITS = {
    WeightType.UINT4: 4,
    WeightType.UINT4B8: 4,
    WeightType.UINT8: 8,
    WeightType.UINT8B128: 8,
}
_WEIGHT_TYPE_BIAS = {
    WeightType.UINT4: None,
    WeightType.UINT4B8: 8,
    WeightType.UINT8: None,
    WeightType.UINT8B128: 128,
}


class Layout(Enum):
    """Resident byte order of a packed weight; `layout.py` draws each one bit by bit."""

    P4 = "P4"
    P8 = "P8"
    CPU_WNA16 = "CPU_WNA16"


class KernelName(Enum):
    """Every implementation of `torch.ops.fusedq.matmul`; a plan names exactly one of these."""

    TRITON_GEMM = "triton-gemm"
    CPU_WNA16 = "cpu-wna16"
    CPU_STRIPED = "cpu-striped"


_TILED_LAYOUTS = {
    WeightType.UINT4: Layout.P4,
    WeightType.UINT4B8: Layout.P4,
    WeightType.UINT8: Layout.P8,
    WeightType.UINT8B128: Layout.P8,
}
_KERNEL_LAYOUTS = {
    KernelName.TRITON_GEMM: _TILED_LAYOUTS,
    KernelName.CPU_WNA16: {
        WeightType.UINT4: Layout.CPU_WNA16,
        WeightType.UINT4B8: Layout.CPU_WNA16,
    },
    KernelName.CPU_STRIPED: _TILED_LAYOUTS,
}


def runs(kernel: KernelName, weight_type: WeightType) -> bool:
    """Whether `kernel` has a layout for `weight_type`."""
    return weight_type in _KERNEL_LAYOUTS[kernel]


def holds(layout: Layout, weight_type: WeightType) -> bool:
    """Whether weights of `weight_type` can be packed in `layout`."""
    return layout in {layouts.get(weight_type) for layouts in _KERNEL_LAYOUTS.values()}


def layout_for(kernel: KernelName, weight_type: WeightType) -> Layout:
    """The layout in which `kernel` reads weights of `weight_type`.

    Raises ValueError, naming the weight types of the kernel, where there is none.
    """
    layouts = _KERNEL_LAYOUTS[kernel]
    if weight_type not in layouts:
        known = ", ".join(each.value for each in layouts)
        raise ValueError(f"kernel {kernel.value} runs {known}, got {weight_type.value}")
    return layouts[weight_type]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One layer's quantization scheme.

    `group_size` counts input features per scale and is resolved: a per-channel scheme has
    `group_size == in_features` of the unsharded layer, never -1.
    """

    weight_type: WeightType
    group_size: int
    scale_dtype: torch.dtype

    @property
    def has_zero_points(self) -> bool:
        return self.weight_type.bias is None


@dataclass(frozen=True, slots=True)
class GemmShape:
    """`y[m, n] = x[m, k] @ w[n, k].T`: m tokens, n out_features, k in_features."""

    m: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What kernel selection needs to know of a device; no live handle.

    `kind` is "cuda" or "cpu". `capability`, `num_sms` and `smem_per_block` (bytes) are GPU facts
    and zero on a CPU; `cpu_isa` is "amx", "vec" or "" (no fused CPU operator) and empty on a GPU.
    """

    name: str
    kind: str
    capability: tuple[int, int] = (0, 0)
    num_sms: int = 0
    smem_per_block: int = 0
    cpu_isa: str = ""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Launch geometry: block_m tokens x block_n out_features, K walked in steps of 128."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A chosen kernel; `source` says why ("rule: ..." or "tuned:<device> row <i>")."""

    kernel: KernelName
    tile: TileConfig | None
    source: str


class Reason(NamedTuple):
    """Why a kernel cannot run a layer: what was found, what is supported."""

    found: str
    supported: str


@dataclass(frozen=True, slots=True)
class LogicalWeight:
    """A format-independent quantized weight, as one rank holds it.

    `codes` uint8 `[N, K]`; `scales` `[N, G]` in `spec.scale_dtype`; `zeros` uint8 `[N, G]` (the
    value subtracted from a code) or None. Row k belongs to group `(k + phase) // group_size`, so
    `G == ceil((K + phase) / group_size)`: a shard may begin and end inside a group.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    spec: QuantSpec
    phase: int = 0


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The kernel ABI: the only resident form of a quantized weight.

    Shapes and dtypes of the tensors depend on `layout` (see `layout.packed_shapes`). `n` and `k`
    are the logical sizes, without padding.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    layout: Layout
    spec: QuantSpec
    n: int
    k: int
    phase: int = 0
