"""AWQ checkpoints: AutoAWQ's three plain packings, 4-bit, and GPTQModel's other widths.

gemm (`WQLinear_GEMM`): qweight int32 `[K, N / 8]` and qzeros int32 `[G, N / 8]` pack out_features:
nibble i of word w is out_feature `8 * w + ORDER[i]`. scales `[G, N]`. In other widths than 4 bits
each row is one stream of bits in the order of out_features, lowest first, of `ceil(N * bits / 32)`
words (`pack_awq` of GPTQModel). vLLM's AWQ-Marlin kernels expect the bytes of 8-bit words in
another order, which no tool writes: a config has to name GPTQModel as what made it.

gemv (`WQLinear_GEMV`): qweight int32 `[N, K / 8]` packs in_features and qzeros int32 `[N, W]`
groups, both in order from the lowest nibble; scales `[N, 8 * W]`. W words hold G groups and padding
(`padded_words`).

gemv_fast (`WQLinear_GEMVFast`): qweight int16 `[N / 4, K]` packs blocks of 4 out_features x 64
in_features (`_unpack_blocks`); scales and qzeros `[8 * W, N]`, where qzeros are `-scale * zero` in
the dtype of the scales.

Zero points are unsigned integers as wide as the codes, stored as they are where they are stored.
Both tools multiply by `(code - zero) * scale` whatever `zero_point` in the config says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.layer import SCALE_DTYPES, Dim, LayerFormat, Region, TensorLayout
from vllm_fusedq.formats.shared.unpacking import (
    IN_ORDER,
    NIBBLES,
    take,
    unpack_columns,
    unpack_rows,
)

BITS = (4,)
STREAMED_BITS = (2, 3, 5, 6, 7, 8)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FAST_ROWS, FAST_COLUMNS = 4, 64

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Unpacked: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"


def streamed_layouts(bits: int) -> tuple[TensorLayout, ...]:
    n = Dim("n", 32, words=bits) if 32 % bits else Dim("n", 32 // bits)
    qweight, qzeros, scales = VERSIONS["gemm"].layouts
    return replace(qweight, dims=(Dim("k"), n)), replace(qzeros, dims=(Dim("g"), n)), scales


def streamed_sizes(stored: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """N and K, of which the words of a row, rounded up, do not say N."""
    shapes = [stored[name].shape for name in ("scales", "qweight") if name in stored]
    if [len(shape) for shape in shapes] != [2, 2]:
        return None
    return shapes[0][1], shapes[1][0]


def padded_words(groups: int, group_size: int) -> int:
    """Words of 8 groups per row in version gemv: `calculate_zeros_width` of AutoAWQ."""
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    return -(-groups // NIBBLES // multiple) * multiple


def has_padded_words(group_size: int) -> bool:
    return group_size in (32, 64) or group_size >= 128


def _unpack_gemm(tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
    block = layer.tensors[0].dims[1].pack
    codes, zeros = (
        take(_gemm_rows(tensors[name], layer.bits), 0, region.n_start, region.n, block)
        for name in ("qweight", "qzeros")
    )
    return codes, tensors["scales"].T.contiguous(), zeros


def _gemm_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 `[K, W]` -> uint8 codes `[32 * W / bits, K]`."""
    return unpack_rows(words.T, bits, ORDER if bits in BITS else IN_ORDER)


def _unpack_gemv(tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
    groups = slice(*region.groups(layer.spec.group_size))
    codes = unpack_columns(tensors["qweight"])
    return (
        take(codes, 1, region.k_start, region.k),
        tensors["scales"][:, groups].contiguous(),
        unpack_columns(tensors["qzeros"])[:, groups].contiguous(),
    )


def _unpack_gemv_fast(tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
    groups = slice(*region.groups(layer.spec.group_size))
    codes = take(_unpack_blocks(tensors["qweight"]), 0, region.n_start, region.n, FAST_ROWS)
    scales, scaled = (tensors[name][groups].T.contiguous() for name in ("scales", "qzeros"))
    return (
        take(codes, 1, region.k_start, region.k, FAST_COLUMNS),
        scales,
        _integer_zeros(scales, scaled, layer),
    )


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


class _Version(NamedTuple):
    """`layouts`, the packed weight first; `unpack` gives codes, scales and zeros of a region."""

    layouts: tuple[TensorLayout, ...]
    unpack: Callable[[Tensors, LayerFormat, Region], Unpacked]


VERSIONS = {
    "gemm": _Version(
        (
            TensorLayout("qweight", (Dim("k"), Dim("n", 8)), (DType.INT32,)),
            TensorLayout("qzeros", (Dim("g"), Dim("n", 8)), (DType.INT32,)),
            TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
        ),
        _unpack_gemm,
    ),
    "gemv": _Version(
        (
            TensorLayout("qweight", (Dim("n"), Dim("k", 8)), (DType.INT32,)),
            TensorLayout("qzeros", (Dim("n"), Dim("g", 8)), (DType.INT32,)),
            TensorLayout("scales", (Dim("n"), Dim("g")), SCALE_DTYPES),
        ),
        _unpack_gemv,
    ),
    "gemv_fast": _Version(
        (
            TensorLayout(
                "qweight",
                (Dim("n", FAST_ROWS), Dim("k", block=FAST_COLUMNS)),
                (DType.INT16,),
            ),
            TensorLayout("qzeros", (Dim("g"), Dim("n")), SCALE_DTYPES),
            TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
        ),
        _unpack_gemv_fast,
    ),
}
