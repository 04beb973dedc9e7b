"""The nouns of the kernel library: weight types, problem shapes, devices, launches, weights.

Plain frozen data. `layouts/` turns a `LogicalWeight` into a `PackedWeight`, `choose/` picks a
`Launch`, `ops.py` runs it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from fusedq_kernels.dtype import DType
from fusedq_kernels.encodings import FP4_VALUES, NF4_VALUES, STORED, Codebook, Codes, Floats

if TYPE_CHECKING:
    import torch


class WeightType(Enum):
    """How a stored code becomes a value, under the field's names (vLLM `scalar_types`).

    `value` is the name, `encoding` what it means. `uint4` and `uint8` are unsigned codes with an
    explicit zero point per group, `uint4b8` and `uint8b128` unsigned codes with the constant zero
    points 8 and 128: a signed integer is stored as the code that lies its zero point higher. The
    codes of `nf4` and `fp4` number the entries of a codebook, those of `float8_e4m3fn` and
    `float4_e2m1f` are numbers themselves; neither have a zero point.
    """

    UINT4 = "uint4", Codes(4, zero=STORED)
    UINT4B8 = "uint4b8", Codes(4, zero=8)
    UINT8 = "uint8", Codes(8, zero=STORED)
    UINT8B128 = "uint8b128", Codes(8, zero=128)
    NF4 = "nf4", Codebook(4, NF4_VALUES)
    FP4 = "fp4", Codebook(4, FP4_VALUES)
    FLOAT8_E4M3FN = "float8_e4m3fn", Floats(4, 3, nan=True)
    FLOAT4_E2M1F = "float4_e2m1f", Floats(2, 1, nan=False)

    encoding: Codes | Codebook | Floats

    def __new__(cls, name: str, encoding: Codes | Codebook | Floats) -> "WeightType":
        member = object.__new__(cls)
        member._value_ = name
        member.encoding = encoding
        return member

    @property
    def bits(self) -> int:
        return self.encoding.bits

    @property
    def bias(self) -> int | None:
        """The constant zero point of integers, or None where there is none."""
        match self.encoding:
            case Codes(zero=int(zero)):
                return zero
        return None

    @property
    def codebook(self) -> tuple[float, ...] | None:
        """The value of each code before scaling, NaN where it has none; None for integers."""
        match self.encoding:
            case Codebook(values=values) | Floats(values=values):
                return values
        return None

    @property
    def nan_codes(self) -> tuple[int, ...]:
        """The codes that are no numbers."""
        return tuple(code for code, value in enumerate(self.codebook or ()) if value != value)

    @property
    def has_zero_points(self) -> bool:
        """Whether each group stores a zero point."""
        return isinstance(self.encoding, Codes) and self.encoding.zero is STORED


class Layout(Enum):
    """Resident byte order of a packed weight; `layouts/` draws each one bit by bit."""

    P4 = "P4"
    P8 = "P8"
    PL4 = "PL4"
    CPU_WNA16 = "CPU_WNA16"


TILED_LAYOUTS = {
    WeightType.UINT4: Layout.P4,
    WeightType.UINT4B8: Layout.P4,
    WeightType.UINT8: Layout.P8,
    WeightType.UINT8B128: Layout.P8,
    WeightType.NF4: Layout.PL4,
    WeightType.FP4: Layout.PL4,
    WeightType.FLOAT8_E4M3FN: Layout.P8,
    WeightType.FLOAT4_E2M1F: Layout.P4,
}
"""The tiled layout of each weight type, which the Triton and the striped CPU kernel read."""

WNA16_LAYOUTS = dict.fromkeys((WeightType.UINT4, WeightType.UINT4B8), Layout.CPU_WNA16)
"""What vLLM's CPU operator reads."""


def holds(layout: Layout, weight_type: WeightType) -> bool:
    """Whether weights of `weight_type` can be packed in `layout`."""
    return layout in (TILED_LAYOUTS.get(weight_type), WNA16_LAYOUTS.get(weight_type))


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One layer's quantization scheme.

    `group_size` counts input features per scale and is resolved: a per-channel scheme has
    `group_size == in_features` of the unsharded layer, never -1. A torch dtype may be given as
    `scale_dtype` and is kept by name. Where `row_scaled`, an fp32 scale of each row multiplies all
    of its groups' scales (NVFP4's global scale).
    """

    weight_type: WeightType
    group_size: int
    scale_dtype: DType
    row_scaled: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_dtype", DType.of(self.scale_dtype))

    @property
    def has_zero_points(self) -> bool:
        return self.weight_type.has_zero_points


@dataclass(frozen=True, slots=True)
class GemmShape:
    """`y[m, n] = x[m, k] @ w[n, k].T`: m tokens, n out_features, k in_features."""

    m: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What kernel selection needs to know of a device; no live handle.

    `kind` is "cuda", "hip" for AMD's GPUs, or "cpu". `capability` is NVIDIA's, `arch` AMD's name
    ("gfx942"); `num_sms` and `smem_per_block` (bytes) are zero on a CPU. `cpu_isa` is what
    cpu-fused is compiled for, empty where it cannot be and on a GPU.
    """

    name: str
    kind: str
    capability: tuple[int, int] = (0, 0)
    num_sms: int = 0
    smem_per_block: int = 0
    cpu_isa: str = ""
    arch: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a server demands of every launch.

    With `batch_invariant` a row of y has the same bits in any batch. Without `sliced_prefill` no
    measured row may lead to sliced-cublas.
    """

    batch_invariant: bool = False
    sliced_prefill: bool = True


DEFAULT_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Launch geometry: block_m tokens x block_n out_features, K walked in steps of 128.

    `split_k` programs share the K of a tile; with `segments` one program adds as many parts of K,
    each summed for itself, to the same bits. With `scale_weights` a group's scale multiplies its
    weights, rounded to 16 bits, instead of the fp32 partial product. With `x_descriptor` tiles of x
    come by the tensor memory accelerator (sm_90 and newer). `scale_steps` is for tcgen05, whose
    sums a thread reads by rows: a per-channel scale multiplies the sums of each step, like a
    group's, instead of the total, and each row's scale is read by itself.
    """

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int
    segments: int = 1
    scale_weights: bool = False
    x_descriptor: bool = False
    scale_steps: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """A chosen kernel, by its name in `catalogue.KERNELS`; `source` says why ("rule: ..." or
    "tuned:<device> row <i>")."""

    kernel: str
    tile: TileConfig | None
    source: str


class Reason(NamedTuple):
    """Why a kernel cannot run a layer: what was found, what is supported, what to do."""

    found: str
    supported: str
    fix: str


@dataclass(frozen=True, slots=True)
class LogicalWeight:
    """A format-independent quantized weight, as one rank holds it.

    `codes` uint8 `[N, K]`; `scales` `[N, G]` in `spec.scale_dtype`; `zeros` uint8 `[N, G]` (the
    value subtracted from a code) or None; `row_scales` fp32 `[N]` or None. Row k belongs to group
    `(k + phase) // group_size`, so `G == ceil((K + phase) / group_size)`: a shard may begin and end
    inside a group.

    With `perm`, int32 `[K]`, row k reads input feature `perm[k]` (activation reordering); a row of
    padding reads any feature and its code is worth zero. Without it row k reads feature k.
    `in_features` is the number of features that tokens have, K where it is not given.
    """

    codes: "torch.Tensor"
    scales: "torch.Tensor"
    zeros: "torch.Tensor | None"
    spec: QuantSpec
    phase: int = 0
    perm: "torch.Tensor | None" = None
    in_features: int = 0
    row_scales: "torch.Tensor | None" = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_features", self.in_features or self.codes.shape[1])


@dataclass(frozen=True, slots=True)
class ResidentWeight:
    """What stays in memory of quantized weights, one or many of a shape and scheme.

    Shapes and dtypes of the tensors depend on `layout` (see `packing.packed_shapes`). `n` and `k`
    are the logical sizes, without padding. `perm` and `in_features` are those of `LogicalWeight`.
    """

    qweight: "torch.Tensor"
    scales: "torch.Tensor"
    zeros: "torch.Tensor | None"
    layout: Layout
    spec: QuantSpec
    n: int
    k: int
    phase: int = 0
    perm: "torch.Tensor | None" = None
    in_features: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_features", self.in_features or self.k)


@dataclass(frozen=True, slots=True)
class PackedWeight(ResidentWeight):
    """The kernel ABI: the only resident form of a quantized weight."""


@dataclass(frozen=True, slots=True)
class StackedWeight(ResidentWeight):
    """Weights of one shape and scheme, one for each expert that a rank holds.

    Tensors have a leading dimension of experts; everything else is that of one expert.
    """

    @property
    def count(self) -> int:
        return self.qweight.shape[0]

    def expert(self, index: int) -> PackedWeight:
        """One expert's weight: views, so that what is packed there is packed here."""
        zeros, perm = (None if t is None else t[index] for t in (self.zeros, self.perm))
        return PackedWeight(
            *(self.qweight[index], self.scales[index], zeros, self.layout, self.spec),
            *(self.n, self.k, self.phase, perm, self.in_features),
        )
