"""Converted checkpoints: every weight already in the layout that the tiled kernels read.

Written by `load/convert.py`. For each module: qweight int32 `[ceil(K / 128), N, words]`, which is
layout P4, P8 or PL4 of `fusedq_kernels.layouts.tiled` without the padding of N; scales `[G, N]` in
their own dtype; zeros uint8 `[G, N]` where the weight type has zero points; row_scales fp32 `[N]`
where rows have scales of their own; with activation
reordering perm int32 `[K]`, the in_feature of each row, rows sorted by group. Nothing depends on a
tensor-parallel size: N can be cut anywhere, K between blocks of 128, and a rank that begins
elsewhere decodes and packs again, as from any other format.

The config says what a header cannot: `layout_version`, the schemes, and each module's scheme and
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedq_kernels.dtype import DType
from fusedq_kernels.geometry import BLOCK_K
from fusedq_kernels.layouts.resident import TILED_WORDS
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    Layout,
    LogicalWeight,
    PackedWeight,
    WeightType,
)
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.float8_packing import check_numbers
from vllm_fusedq.formats.layer import (
    SCALE_DTYPES,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_finite,
    check_slices,
    with_all_groups,
)
from vllm_fusedq.formats.packing import Packing, Placed
from vllm_fusedq.formats.shared.ordering import sort_rows
from vllm_fusedq.formats.shared.rows import Support

if TYPE_CHECKING:
    from fusedq_kernels.layouts.tiled import TiledCodec

LAYOUT_VERSION = 1
CONVERT_AGAIN = "convert the original checkpoint again with `fusedq convert`"
QWEIGHT, SCALES, ZEROS, PERM = "qweight", "scales", "zeros", "perm"
ROW_SCALES, ROW_SCALED = "row_scales", "row_scaled"
KEPT_SCALES = (*SCALE_DTYPES, DType.FLOAT8_E4M3FN, DType.FLOAT8_E8M0FNU)


class FusedQFormat(CheckpointFormat):
    """`quant_method: fusedq`, written by `fusedq convert`."""

    name = "fusedq"
    markers = frozenset({QWEIGHT, SCALES, ZEROS, PERM})
    support = (
        Support(
            f"any of these after `fusedq convert` (layout version {LAYOUT_VERSION})",
            "as the original",
            "as the original",
            groups="as the original",
        ),
    )
    exclusion = head_setting = embedding_setting = "modules"

    def check_config(self) -> None:
        version = self.config.get("layout_version")
        if type(version) is not int or version != LAYOUT_VERSION:
            raise self.refusal(
                f"layout_version {version!r:.40}", f"layout_version {LAYOUT_VERSION}", CONVERT_AGAIN
            )
        schemes, modules = self.config.get("schemes"), self.config.get("modules")
        if not isinstance(schemes, list) or not isinstance(modules, dict) or not modules:
            raise self.refusal(
                "a config without schemes or modules", "what `fusedq convert` writes", CONVERT_AGAIN
            )
        known = [self._read_scheme(scheme) for scheme in schemes]
        self.layers = {
            name: self._read_module(name, entry, known) for name, entry in modules.items()
        }

    def modules(self) -> list[str]:
        # The config lists them all, so that none can get lost with its tensors
        return list(dict.fromkeys([*super().modules(), *self.layers]))

    def claims(self, module: str) -> bool:
        return module in self.layers

    def claims_head(self, module: str) -> bool:
        return self.claims(module)

    def claims_embedding(self, module: str) -> bool:
        return self.claims(module)

    def scheme(self, module: str) -> Scheme:
        scheme, n, k = self.layers[module]
        weight_type, group_size, ordered, row_scaled = scheme
        words = TILED_WORDS[TILED_LAYOUTS[weight_type]]
        blocks = Dim(None, size=-(-k // BLOCK_K)) if ordered else Dim("k", BLOCK_K)
        layouts = [
            TensorLayout(QWEIGHT, (blocks, Dim("n"), Dim(None, size=words)), (DType.INT32,)),
            TensorLayout(SCALES, (Dim("g"), Dim("n")), KEPT_SCALES),
        ]
        if weight_type.has_zero_points:
            layouts.append(TensorLayout(ZEROS, (Dim("g"), Dim("n")), (DType.UINT8,)))
        if row_scaled:
            layouts.append(TensorLayout(ROW_SCALES, (Dim("n"),), (DType.FLOAT32,)))
        if ordered:
            # Rows are sorted: which of them a rank needs, only perm tells
            layouts = list(with_all_groups(tuple(layouts), -(-k // group_size)))
            layouts.append(TensorLayout(PERM, (Dim(None, size=k),), (DType.INT32,)))
        packing = TiledPacking(bits=weight_type.bits, ordered=ordered)
        return Scheme(
            *(packing, weight_type, group_size, tuple(layouts), SCALES),
            sizes=(n, k),
            row_scaled=row_scaled,
        )

    def _read_scheme(self, scheme: Any) -> _Scheme:
        types = {each.value: each for each in WeightType}
        if not isinstance(scheme, dict) or scheme.get("weight_type") not in list(types):
            raise self.refusal(
                f"the scheme {scheme!r:.80}", f"weight_type {', '.join(types)}", CONVERT_AGAIN
            )
        group_size = scheme.get("group_size")
        flags = scheme.get("ordered"), scheme.get(ROW_SCALED, False)
        if (
            type(group_size) is not int
            or group_size < 1
            or {type(flag) for flag in flags} != {bool}
        ):
            raise self.refusal(
                f"the scheme {scheme!r:.80}",
                f"a group_size, ordered and {ROW_SCALED} true or false",
                CONVERT_AGAIN,
            )
        return _Scheme(types[scheme["weight_type"]], group_size, *flags)

    def _read_module(
        self, name: str, entry: Any, schemes: list[_Scheme]
    ) -> tuple[_Scheme, int, int]:
        numbers = entry if isinstance(entry, list) and len(entry) == 3 else []
        if not numbers or any(type(each) is not int for each in numbers):
            raise self.refusal(f"{name} as {entry!r:.80}", "scheme, N and K", CONVERT_AGAIN)
        scheme, n, k = numbers
        if not 0 <= scheme < len(schemes) or min(n, k) < 1:
            raise self.refusal(f"{name} as {entry!r:.80}", "a scheme and sizes", CONVERT_AGAIN)
        return schemes[scheme], n, k


class _Scheme(NamedTuple):
    weight_type: WeightType
    group_size: int
    ordered: bool
    row_scaled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledPacking(Packing):
    """The layouts of the tiled kernels, rows of an ordered layer sorted by group."""

    def logical(
        self, tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, SCALES)
        _check_codes(tensors[QWEIGHT], layer)
        codes = _codec(layer).decode(tensors[QWEIGHT])
        scales = tensors[SCALES].T.contiguous()
        zeros = _read_zeros(tensors, layer)
        if not self.ordered:
            first = region.k_start % BLOCK_K
            codes = codes[:, first : first + region.k].contiguous()
            phase = region.k_start % layer.spec.group_size
            row_scales = _read_row_scales(tensors, layer)
            return LogicalWeight(codes, scales, zeros, layer.spec, phase, row_scales=row_scales)
        perm = _read_perm(tensors[PERM], layer)
        if region.k == layer.k:
            codes = codes[:, : layer.k].contiguous()
            return LogicalWeight(codes, scales, zeros, layer.spec, 0, perm.int(), layer.k)
        places = torch.arange(layer.k, device=perm.device)
        place_of = torch.empty_like(perm).index_copy_(0, perm, places)
        place_of = place_of[region.k_start : region.k_stop]
        codes, g_idx = codes.index_select(1, place_of), place_of // layer.spec.group_size
        return sort_rows(codes, scales, zeros, g_idx, PERM, layer, region)

    def place(
        self,
        tensors: Mapping[str, torch.Tensor],
        layer: LayerFormat,
        region: Region,
        packed: PackedWeight,
        start: int,
    ) -> Placed | None:
        if not self._lies_as_in(packed, layer, region):
            return None
        check_slices(tensors, layer, region, SCALES)
        _check_codes(tensors[QWEIGHT], layer)
        from fusedq_kernels.layouts.scales import of_rows

        zeros = _read_zeros(tensors, layer)
        _codec(layer).write_groups(packed, start, tensors[SCALES].T.contiguous(), zeros)
        if (row_scales := _read_row_scales(tensors, layer)) is not None:
            of_rows(packed)[start : start + region.n] = row_scales
        packed.qweight[:, start : start + region.n].copy_(tensors[QWEIGHT])
        return Placed(_read_perm(tensors[PERM], layer).int() if self.ordered else None)

    def _lies_as_in(self, packed: PackedWeight, layer: LayerFormat, region: Region) -> bool:
        if self.ordered and region.k != layer.k:
            return False
        begins = region.k_start % BLOCK_K == 0
        ends = region.k_stop % BLOCK_K == 0 or region.k_stop == layer.k
        return packed.layout is _layout(layer) and begins and ends


def _layout(layer: LayerFormat) -> Layout:
    return TILED_LAYOUTS[layer.spec.weight_type]


def _codec(layer: LayerFormat) -> TiledCodec:
    from fusedq_kernels.layouts.tiled import TILED

    return TILED[_layout(layer)]


def _check_codes(qweight: torch.Tensor, layer: LayerFormat) -> None:
    """Where the weight type has NaN, a code is a whole byte of the layout."""
    if layer.spec.weight_type.nan_codes:
        # A block of K at a time, because the layer may be large
        for block in qweight:
            check_numbers(block.contiguous().view(torch.uint8), layer.module, QWEIGHT)


def _read_zeros(tensors: Mapping[str, torch.Tensor], layer: LayerFormat) -> torch.Tensor | None:
    if not layer.spec.has_zero_points:
        return None
    zeros, bound = tensors[ZEROS].T.contiguous(), 1 << layer.spec.weight_type.bits
    if bound <= torch.iinfo(zeros.dtype).max and int(zeros.max()) >= bound:
        raise WeightLoadError(
            f"{layer.module}.{ZEROS}: found the zero point {int(zeros.max())}, expected less than "
            f"{bound}; {CONVERT_AGAIN}"
        )
    return zeros


def _read_row_scales(
    tensors: Mapping[str, torch.Tensor], layer: LayerFormat
) -> torch.Tensor | None:
    if not layer.spec.row_scaled:
        return None
    check_finite(tensors[ROW_SCALES], layer.module, ROW_SCALES)
    return tensors[ROW_SCALES]


def _read_perm(stored: torch.Tensor, layer: LayerFormat) -> torch.Tensor:
    """perm as int64 `[K]`."""
    perm = stored.long()
    if not torch.equal(perm.sort().values, torch.arange(layer.k, device=perm.device)):
        raise WeightLoadError(
            f"{layer.module}.{PERM}: found in_features twice or out of range, expected each of "
            f"{layer.k} once; {CONVERT_AGAIN}"
        )
    return perm
