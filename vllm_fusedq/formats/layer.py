"""How a quantized linear lies in a checkpoint, as data: stored tensors against the logical grid.

Which stored dimension runs along N, K or the groups, and how many logical indices one stored
element holds, is plain data here, so that a planner can compute the slice that any rank needs. The
tensor names and bit orders belong to a format's packings, comparing headers with a description to
`headers.py`, the rules that all formats obey to `base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import QuantSpec, WeightType
from vllm_fusedq.errors import WeightLoadError

if TYPE_CHECKING:
    from vllm_fusedq.formats.packing import Packing

Axis = Literal["n", "k", "g"]

DTYPES = {
    "F8_E8M0": DType.FLOAT8_E8M0FNU,
    "F64": DType.FLOAT64,
    "F32": DType.FLOAT32,
    "F16": DType.FLOAT16,
    "BF16": DType.BFLOAT16,
    "F8_E4M3": DType.FLOAT8_E4M3FN,
    "I64": DType.INT64,
    "I32": DType.INT32,
    "I16": DType.INT16,
    "I8": DType.INT8,
    "U8": DType.UINT8,
    "BOOL": DType.BOOL,
}
SCALE_DTYPES = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32)


@dataclass(frozen=True, slots=True)
class Dim:
    """One stored dimension: the logical axis it runs along, `pack` indices in `words` elements.

    `axis` is "n" (out_features), "k" (in_features), "g" (groups along K) or None for a dimension of
    fixed `size` that every rank keeps whole. Where only whole blocks of logical indices mean
    something, `block` is their size, a multiple of `pack`. Where the last element may be padded,
    the logical size is the last `multiple` that the elements hold.
    """

    axis: Axis | None
    pack: int = 1
    size: int = 0
    block: int = 1
    words: int = 1
    multiple: int = 1

    def logical(self, stored: int) -> int:
        """Logical indices of a dimension of `stored` elements."""
        return stored * self.pack // self.words // self.multiple * self.multiple


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """How one stored tensor covers the logical grid; `name` is its suffix below the module.

    `dtypes` are the accepted ones; in a `LayerFormat` exactly the one found in the header. Where
    `flat`, the file holds the same bytes in any shape, and `flat` is the dtype of the elements that
    `dims` speak of.
    """

    name: str
    dims: tuple[Dim, ...]
    dtypes: tuple[DType, ...]
    flat: DType | None = None

    @property
    def dtype(self) -> DType:
        return self.dtypes[0]

    @property
    def element(self) -> DType:
        """What one element along `dims` is."""
        return self.flat or self.dtype


@dataclass(frozen=True, slots=True)
class Region:
    """The logical rows `[n_start, n_stop)` and columns `[k_start, k_stop)` of one weight."""

    n_start: int
    n_stop: int
    k_start: int
    k_stop: int

    @property
    def n(self) -> int:
        return self.n_stop - self.n_start

    @property
    def k(self) -> int:
        return self.k_stop - self.k_start

    def groups(self, group_size: int) -> tuple[int, int]:
        """First group touched and one past the last."""
        return self.k_start // group_size, -(-self.k_stop // group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFormat:
    """One quantized linear of the checkpoint, unsharded, as its headers and config describe it.

    `format` is the method that its config names, `exclusion` what excludes modules there, both for
    messages. `tensors` lists the tensors that this module really has, the packed weight first, and
    `packing` knows what lies in them. `activations` says in words how the config quantizes what the
    weight multiplies, where it does. Picklable.
    """

    format: str
    exclusion: str
    module: str
    packing: Packing
    spec: QuantSpec
    n: int
    k: int
    tensors: tuple[TensorLayout, ...]
    activations: str = ""

    @property
    def ordered(self) -> bool:
        """Whether rows are sorted at load (activation reordering)."""
        return self.packing.ordered

    @property
    def whole(self) -> Region:
        return Region(0, self.n, 0, self.k)

    @property
    def description(self) -> str:
        """Like "awq 4-bit g128, zero points" or "gptq 3-bit g32, symmetric, resident as 4-bit"."""
        group = "per channel" if self.spec.group_size == self.k else f"g{self.spec.group_size}"
        zeros = ", zero points" if self.spec.has_zero_points else ", symmetric"
        if self.spec.weight_type.codebook is not None:
            zeros = ""
        order = ", act-order" if self.ordered else ""
        name = f"{self.format} {self.packing.name}".rstrip()
        bits, resident = self.packing.bits, self.spec.weight_type.bits
        widened = f", resident as {resident}-bit" if bits != resident else ""
        kept = f", activations in 16 bits, not {self.activations}" if self.activations else ""
        return f"{name} {bits}-bit {group}{zeros}{order}{widened}{kept}"

    def tensor(self, name: str) -> TensorLayout | None:
        return next((layout for layout in self.tensors if layout.name == name), None)

    def stored_shape(self, layout: TensorLayout, region: Region | None = None) -> tuple[int, ...]:
        """Shape of a stored tensor, or of the part of it that `region` needs."""
        slices = stored_slices(layout, region or self.whole, self.spec.group_size)
        return tuple(part.stop - part.start for part in slices)

    def fits(self, layout: TensorLayout, shape: tuple[int, ...], dtype: DType) -> bool:
        """Whether a file's tensor of this shape and dtype is the whole of `layout`."""
        expected = self.stored_shape(layout)
        if layout.flat is None:
            return shape == expected
        return prod(shape) * dtype.itemsize == prod(expected) * layout.flat.itemsize

    def grid(self, layout: TensorLayout, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that fits, as the grid that `layout.dims` describe; shares its memory."""
        if layout.flat is None:
            return tensor
        return tensor.reshape(-1).view(layout.flat.torch).view(self.stored_shape(layout))


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a format's config says of one module; the headers say the rest of a `LayerFormat`.

    `layouts[0]` is the packed weight, whose dims give N and K unless `sizes` does. `group_size`
    may be -1: all of K. `scales` is the tensor whose dtype the scales have, unless `scale_dtype`
    says otherwise. Where `row_scaled`, rows have a scale beside those of their groups.
    """

    packing: Packing
    weight_type: WeightType
    group_size: int
    layouts: tuple[TensorLayout, ...]
    scales: str
    sizes: tuple[int, int] | None = None
    scale_dtype: DType | None = None
    row_scaled: bool = False


def stored_slices(layout: TensorLayout, region: Region, group_size: int) -> tuple[slice, ...]:
    """The part of a stored tensor that `region` needs, rounded out to whole stored elements."""
    g_start, g_stop = region.groups(group_size)
    bounds = {
        "n": (region.n_start, region.n_stop),
        "k": (region.k_start, region.k_stop),
        "g": (g_start, g_stop),
    }
    slices = []
    for dim in layout.dims:
        start, stop = bounds[dim.axis] if dim.axis else (0, dim.size)
        first = start // max(dim.pack, dim.block) * max(dim.pack, dim.block)
        stop = -(-stop // dim.block) * dim.block
        slices.append(slice(first * dim.words // dim.pack, -(-stop * dim.words // dim.pack)))
    return tuple(slices)


def with_all_groups(layouts: tuple[TensorLayout, ...], groups: int) -> tuple[TensorLayout, ...]:
    """The layouts for ranks that keep all `groups` groups, whichever in_features they hold."""
    return tuple(
        replace(
            layout,
            dims=tuple(
                Dim(None, size=-(-groups // dim.pack)) if dim.axis == "g" else dim
                for dim in layout.dims
            ),
        )
        for layout in layouts
    )


def check_slices(
    tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region, scales: str
) -> None:
    """Refuse tensors that are not exactly the slices of `region`, and scales that are not finite.

    Raises:
        WeightLoadError: a tensor is missing, has another dtype or shape, or a scale is NaN or inf.
    """
    if not (0 <= region.n_start < region.n_stop <= layer.n) or not (
        0 <= region.k_start < region.k_stop <= layer.k
    ):
        raise ValueError(f"{region} does not lie inside [{layer.n}, {layer.k}]")
    for layout in layer.tensors:
        tensor = tensors.get(layout.name)
        if tensor is None:
            raise WeightLoadError(f"{layer.module}: tensor {layout.name} was not loaded")
        expected, dtype = layer.stored_shape(layout, region), layout.element.torch
        if tensor.dtype != dtype or tuple(tensor.shape) != expected:
            raise WeightLoadError(
                f"{layer.module}.{layout.name}: found {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} {list(expected)} for {region}"
            )
    check_finite(tensors[scales], layer.module, scales)


def check_finite(scales: torch.Tensor, module: str, name: str) -> None:
    """Raise WeightLoadError where a scale is NaN or inf."""
    # PyTorch has no isfinite of 8-bit floats
    scales = scales if scales.itemsize > 1 else scales.to(torch.float32)
    if not bool(torch.isfinite(scales).all()):
        count = int((~torch.isfinite(scales)).sum())
        raise WeightLoadError(
            f"{module}.{name}: found {count} NaN or infinite values, expected finite "
            f"scales; the file is damaged or was never filled: download or quantize it again"
        )
