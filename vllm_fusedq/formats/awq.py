"""AWQ checkpoints as AutoAWQ stores them, 4-bit, in its three plain packings.

gemm (`WQLinear_GEMM`): qweight int32 `[K, N / 8]` and qzeros int32 `[G, N / 8]` pack out_features:
nibble i of word w is out_feature `8 * w + ORDER[i]`. scales `[G, N]`.

gemv (`WQLinear_GEMV`): qweight int32 `[N, K / 8]` packs in_features and qzeros int32 `[N, W]`
groups, both in order from the lowest nibble; scales `[N, 8 * W]`. W words hold G groups and padding
(`padded_words`).

gemv_fast (`WQLinear_GEMVFast`): qweight int16 `[N / 4, K]` packs blocks of 4 out_features x 64
in_features (`_unpack_blocks`); scales and qzeros `[8 * W, N]`, where qzeros are `-scale * zero` in
the dtype of the scales.

Zero points are integers below 16, stored as they are where they are stored. AutoAWQ multiplies by
`(code - zero) * scale` whatever `zero_point` in the config says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from fusedq_kernels.dtype import DType
from fusedq_kernels.lazy import torch
from fusedq_kernels.types import LogicalWeight, WeightType
from vllm_fusedq.errors import PreflightError, Problem, WeightLoadError
from vllm_fusedq.formats.base import (
    USE_VLLM,
    CheckpointFormat,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_slices,
)
from vllm_fusedq.formats.layer import SCALE_DTYPES, with_all_groups
from vllm_fusedq.formats.support import Support, bit_widths
from vllm_fusedq.formats.unpacking import NIBBLES, take, unpack_columns, unpack_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FAST_ROWS, FAST_COLUMNS = 4, 64

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Unpacked: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"


BITS = (4,)


class AwqFormat(CheckpointFormat):
    """`quant_method: awq`, version gemm, gemv or gemv_fast."""

    name = "awq"
    config_sources = ("quant_config.json",)
    markers = frozenset({"qweight", "qzeros"})
    leftovers = frozenset({"scales"})
    support = (
        Support("AWQ `gemm`", bit_widths(BITS), "yes"),
        Support(
            "AWQ `gemv` and `gemv_fast`",
            bit_widths(BITS),
            "yes",
            groups="32, 64, multiples of 32 from 128",
        ),
    )
    exclusion = "modules_to_not_convert"

    def check_config(self) -> None:
        bits = self._option("bits", "w_bit")
        if bits not in BITS:
            # AutoAWQ packs nothing else, and others order the bytes of 8-bit words differently
            raise self.refusal(f"bits {bits!r:.80}", "4 bits, the one width that AutoAWQ packs")
        self.group_size = self.check_group_size(self._option("group_size", "q_group_size"))
        version = self._option("version", "checkpoint_format", "format") or "gemm"
        self.version = str(version).lower()
        if self.version not in VERSIONS:
            raise self.refusal(
                f"version {version!r}",
                f"version {', '.join(VERSIONS)} (others pack the weights differently)",
                f"quantize again with version gemm, or {USE_VLLM}",
            )
        if self.version != "gemm" and not _has_padded_words(self.group_size):
            raise self.refusal(
                f"group_size {self.group_size} with version {self.version}",
                "group_size 32, 64, or 128 and more with version gemv and gemv_fast",
                f"quantize again with version gemm, or {USE_VLLM}",
            )
        if not isinstance(self.config.get("zero_point", True), bool):
            raise self.refusal(f"zero_point {self.config['zero_point']!r:.80}", "true or false")
        if self.config.get("dynamic"):
            raise self.refusal("per-module overrides (dynamic)", "one scheme for all modules")
        self.excluded = self.check_names("modules_to_not_convert")
        scaled = [m for m, stored in self.checkpoint.modules().items() if set(stored) == {"scales"}]
        if scaled:
            raise self.refusal(
                f"a scaled activation ({scaled[0]}.scales)", "models without scaled activations"
            )

    def claims(self, module: str) -> bool:
        # AutoAWQ converts the linears of the decoder blocks, but for names that contain a given one
        return self.block_of(module) in self.quantized_blocks and not any(
            name in module for name in self.excluded
        )

    def scheme(self, module: str) -> Scheme:
        weight = self.checkpoint.modules()[module].get("qweight")
        layouts = VERSIONS[self.version].layouts
        if self.version != "gemm" and weight is not None and len(weight.shape) == 2:
            k = weight.shape[1] * layouts[0].dims[1].pack
            if k % self.group_size:
                problem = Problem(
                    module,
                    f"qweight of shape {list(weight.shape)}, which is {k} in_features, in groups "
                    f"of {self.group_size}",
                    f"whole groups with version {self.version}",
                    "correct version in the config if the model was packed with another one",
                )
                raise PreflightError([problem])
            words = padded_words(k // self.group_size, self.group_size)
            layouts = with_all_groups(layouts, NIBBLES * words)
        variant = "" if self.version == "gemm" else self.version
        return Scheme(WeightType.UINT4, self.group_size, layouts, scales="scales", variant=variant)

    @staticmethod
    def decode(tensors: Tensors, layer: LayerFormat, region: Region) -> LogicalWeight:
        check_slices(tensors, layer, region, "scales")
        codes, scales, zeros = VERSIONS[layer.variant or "gemm"].unpack(tensors, layer, region)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)

    def _option(self, *names: str) -> object:
        """The first of several spellings: config.json and quant_config.json differ."""
        return next((self.config[name] for name in names if name in self.config), None)


def padded_words(groups: int, group_size: int) -> int:
    """Words of 8 groups per row in version gemv: `calculate_zeros_width` of AutoAWQ."""
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    return -(-groups // NIBBLES // multiple) * multiple


def _has_padded_words(group_size: int) -> bool:
    return group_size in (32, 64) or group_size >= 128


def _unpack_gemm(tensors: Tensors, layer: LayerFormat, region: Region) -> Unpacked:
    codes = unpack_rows(tensors["qweight"].T, ORDER)
    zeros = unpack_rows(tensors["qzeros"].T, ORDER)
    return (
        take(codes, 0, region.n_start, region.n),
        tensors["scales"].T.contiguous(),
        take(zeros, 0, region.n_start, region.n),
    )


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
