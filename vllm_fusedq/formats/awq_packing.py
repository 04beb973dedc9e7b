"""AWQ checkpoints: AutoAWQ's three plain packings, 4-bit, and GPTQModel's other widths.

gemm (`WQLinear_GEMM`): qweight int32 `[K, N / 8]` and qzeros int32 `[G, N / 8]` pack out_features:
nibble i of word w is out_feature `8 * w + ORDER[i]`. scales `[G, N]`. In other widths than 4 bits
each row is one stream of bits, lowest first, of `ceil(N * bits / 32)` words: out_features in order
(`pack_awq` of GPTQModel), or each eight of them in `ORDER` (`pack_awq_bitstream` of AutoRound).
vLLM's AWQ-Marlin kernels expect the bytes of 8-bit words in another order, which no tool writes: a
config has to name GPTQModel as what made it.

gemv (`WQLinear_GEMV`): qweight int32 `[N, K / 8]` packs in_features and qzeros int32 `[N, W]`
groups, both in order from the lowest nibble; scales `[N, 8 * W]`. W words hold G groups and padding
(`_with_padding`).

gemv_fast (`WQLinear_GEMVFast`): qweight int16 `[N / 4, K]` packs blocks of 4 out_features x 64
in_features (`_unpack_blocks`); scales and qzeros `[8 * W, N]`, where qzeros are `-scale * zero` in
the dtype of the scales.

Zero points are unsigned integers as wide as the codes, stored as they are where they are stored.
Both tools multiply by `(code - zero) * scale` whatever `zero_point` in the config says.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats.layer import (
    SCALE_DTYPES,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_slices,
    with_all_groups,
)
from vllm_fusedq.formats.packing import Packing
from vllm_fusedq.formats.shared.unpacking import (
    IN_ORDER,
    NIBBLES,
    take,
    unpack_columns,
    unpack_rows,
)
from vllm_fusedq.formats.shared.widening import resident_type

BITS = (4,)
STREAMED_BITS = (2, 3, 5, 6, 7, 8)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FAST_ROWS, FAST_COLUMNS = 4, 64

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Unpacked: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqPacking(Packing):
    """What AWQ's packings have in common: unsigned codes and zero points, never reordered."""

    @abstractmethod
    def scheme(self, module: str, stored: Mapping[str, TensorInfo], group_size: int) -> Scheme:
        """The scheme of a module with these headers; `group_size` -1 is all of K.

        Raises:
            PreflightError: the packing stores no such module.
        """

    @abstractmethod
    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        """Codes, scales and zeros as `logical` gives them, of tensors that are checked."""

    def logical(self, tensors: Tensors, layer: LayerFormat, region: Region) -> LogicalWeight:
        check_slices(tensors, layer, region, "scales")
        codes, scales, zeros = self.unpack(tensors, layer, region)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)

    def _scheme(
        self,
        layouts: tuple[TensorLayout, ...],
        group_size: int,
        sizes: tuple[int, int] | None = None,
    ) -> Scheme:
        weight_type = resident_type(self.bits, symmetric=False)
        return Scheme(self, weight_type, group_size, layouts, scales="scales", sizes=sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPacking(AwqPacking):
    """Version gemm: 4 bits in AutoAWQ's order, other widths in one stream of bits.

    `interleaved`: the codes of other widths lie in AutoAWQ's order too, in whole runs of 32.
    """

    interleaved: bool = False

    def scheme(self, module: str, stored: Mapping[str, TensorInfo], group_size: int) -> Scheme:
        n = Dim("n", 32 // self.bits)
        if 32 % self.bits:
            n = Dim("n", 32, words=self.bits, block=32 if self.interleaved else 1)
        layouts = (
            TensorLayout("qweight", (Dim("k"), n), (DType.INT32,)),
            TensorLayout("qzeros", (Dim("g"), n), (DType.INT32,)),
            TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
        )
        sizes = _streamed_sizes(stored) if self.bits in STREAMED_BITS else None
        return self._scheme(layouts, group_size, sizes)

    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        order = ORDER if self.bits in BITS or self.interleaved else IN_ORDER
        block = layer.tensors[0].dims[1].pack
        # Rows of K become columns: int32 [K, W] -> uint8 [32 * W / bits, K]
        codes, zeros = (
            take(unpack_rows(tensors[name].T, self.bits, order), 0, region.n_start, region.n, block)
            for name in ("qweight", "qzeros")
        )
        return codes, tensors["scales"].T.contiguous(), zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvPacking(AwqPacking):
    """Version gemv, 4 bits."""

    name: str = "gemv"

    def scheme(self, module: str, stored: Mapping[str, TensorInfo], group_size: int) -> Scheme:
        layouts = (
            TensorLayout("qweight", (Dim("n"), Dim("k", 8)), (DType.INT32,)),
            TensorLayout("qzeros", (Dim("n"), Dim("g", 8)), (DType.INT32,)),
            TensorLayout("scales", (Dim("n"), Dim("g")), SCALE_DTYPES),
        )
        return self._scheme(_with_padding(layouts, module, stored, group_size, self), group_size)

    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        groups = slice(*region.groups(layer.spec.group_size))
        codes = unpack_columns(tensors["qweight"])
        return (
            take(codes, 1, region.k_start, region.k),
            tensors["scales"][:, groups].contiguous(),
            unpack_columns(tensors["qzeros"])[:, groups].contiguous(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvFastPacking(AwqPacking):
    """Version gemv_fast, 4 bits."""

    name: str = "gemv_fast"

    def scheme(self, module: str, stored: Mapping[str, TensorInfo], group_size: int) -> Scheme:
        blocks = (Dim("n", FAST_ROWS), Dim("k", block=FAST_COLUMNS))
        layouts = (
            TensorLayout("qweight", blocks, (DType.INT16,)),
            TensorLayout("qzeros", (Dim("g"), Dim("n")), SCALE_DTYPES),
            TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
        )
        return self._scheme(_with_padding(layouts, module, stored, group_size, self), group_size)

    def unpack(self, tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
        groups = slice(*region.groups(layer.spec.group_size))
        codes = take(_unpack_blocks(tensors["qweight"]), 0, region.n_start, region.n, FAST_ROWS)
        scales, scaled = (tensors[name][groups].T.contiguous() for name in ("scales", "qzeros"))
        return (
            take(codes, 1, region.k_start, region.k, FAST_COLUMNS),
            scales,
            _integer_zeros(scales, scaled, layer),
        )


VERSIONS: dict[str, type[AwqPacking]] = {
    "gemm": GemmPacking,
    "gemv": GemvPacking,
    "gemv_fast": GemvFastPacking,
}
"""By the version that a config names."""


def has_padded_words(group_size: int) -> bool:
    """Whether AutoAWQ's versions gemv and gemv_fast know groups of this size."""
    return group_size in (32, 64) or group_size >= 128


def _streamed_sizes(stored: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """N and K, of which the words of a row, rounded up, do not say N."""
    shapes = [stored[name].shape for name in ("scales", "qweight") if name in stored]
    if [len(shape) for shape in shapes] != [2, 2]:
        return None
    return shapes[0][1], shapes[1][0]


def _with_padding(
    layouts: tuple[TensorLayout, ...],
    module: str,
    stored: Mapping[str, TensorInfo],
    group_size: int,
    packing: AwqPacking,
) -> tuple[TensorLayout, ...]:
    """The layouts with the groups of padding that versions gemv and gemv_fast store.

    Rows take `calculate_zeros_width` (AutoAWQ) words of 8 groups.

    Raises:
        PreflightError: the last group is not whole.
    """
    weight = stored.get("qweight")
    if weight is None or len(weight.shape) != 2:
        return layouts
    k = weight.shape[1] * layouts[0].dims[1].pack
    if k % group_size:
        raise PreflightError.single(
            module,
            f"qweight of shape {list(weight.shape)}, which is {k} in_features, in groups "
            f"of {group_size}",
            f"whole groups with version {packing.name}",
            "correct version in the config if the model was packed with another one",
        )
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    words = -(-k // group_size // NIBBLES // multiple) * multiple
    return with_all_groups(layouts, NIBBLES * words)


def _unpack_blocks(words: torch.Tensor) -> torch.Tensor:
    """int16 `[N / 4, K]` -> uint8 codes `[N, K]`.

    The 256 nibbles of 64 words, lowest first, are 4 rows of 64 columns; in every 32 of them, place
    `8 * a + 4 * c + b` (a, b < 4, c < 2) holds column `8 * b + 2 * a + c`. Source: `pack_intweight`
    of AutoAWQ.
    """
    quads, k = words.shape
    places = unpack_columns(words).view(quads, k // FAST_COLUMNS, FAST_ROWS, 2, 4, 2, 4)
    return places.permute(0, 2, 1, 3, 6, 4, 5).reshape(FAST_ROWS * quads, k)


def _integer_zeros(scales: torch.Tensor, scaled: torch.Tensor, layer: LayerFormat) -> torch.Tensor:
    """The zero points, uint8, of `-scale * zero` rounded to the dtype of the scales."""
    exact = scales.float()
    zeros = torch.where(exact == 0, 0, -scaled.float() / exact).round()
    again = -(exact * zeros).to(scaled.dtype)
    wrong = (again != scaled) | (zeros < 0) | (zeros > 15)
    if bool(wrong.any()):
        n, group = (int(i) for i in wrong.nonzero()[0])
        raise WeightLoadError(
            f"{layer.module}.qzeros: found {float(scaled[n, group]):.6g} beside the scale "
            f"{float(scales[n, group]):.6g} ({int(wrong.sum())} such values), expected minus the "
            "scale times a zero point of 0 to 15; download the checkpoint again or quantize the "
            "model again"
        )
    return zeros.to(torch.uint8)
