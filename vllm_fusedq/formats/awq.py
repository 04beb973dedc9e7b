"""AWQ checkpoints as AutoAWQ's `WQLinear_GEMM` stores them, 4-bit with zero points.

qweight int32 `[K, N / 8]` and qzeros int32 `[G, N / 8]` pack out_features: nibble i of word w is
out_feature `8 * w + ORDER[i]`. scales `[G, N]`. Zero points are stored as they are.
"""

from collections.abc import Mapping

import torch

from fusedq_kernels.types import LogicalWeight, WeightType
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
from vllm_fusedq.formats.layer import SCALE_DTYPES
from vllm_fusedq.formats.unpacking import take, unpack_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

LAYOUTS = (
    TensorLayout("qweight", (Dim("k"), Dim("n", 8)), (torch.int32,)),
    TensorLayout("qzeros", (Dim("g"), Dim("n", 8)), (torch.int32,)),
    TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
)


class AwqFormat(CheckpointFormat):
    """`quant_method: awq`, version gemm."""

    name = "awq"
    config_sources = ("quant_config.json",)
    markers = frozenset({"qweight", "qzeros"})
    exclusion = "modules_to_not_convert"

    def check_config(self) -> None:
        bits = self._option("bits", "w_bit")
        if bits != 4:
            raise self.refusal(f"bits {bits!r}", "4 bits")
        self.group_size = self.check_group_size(self._option("group_size", "q_group_size"))
        version = self._option("version", "checkpoint_format", "format") or "gemm"
        if str(version).lower() != "gemm":
            raise self.refusal(
                f"version {version!r}",
                "version gemm (gemv, gemv_fast and exllama pack the weights differently)",
                f"quantize again with version gemm, or {USE_VLLM}",
            )
        if self.config.get("zero_point", True) is not True:
            raise self.refusal(
                f"zero_point {self.config['zero_point']!r}",
                "zero_point true",
                f"quantize again with zero_point true, or {USE_VLLM}",
            )
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
        return Scheme(WeightType.UINT4, self.group_size, LAYOUTS, scales="scales")

    @staticmethod
    def decode(
        tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, "scales")
        codes = unpack_rows(tensors["qweight"].T, ORDER)
        zeros = unpack_rows(tensors["qzeros"].T, ORDER)
        return LogicalWeight(
            codes=take(codes, 0, region.n_start, region.n),
            scales=tensors["scales"].T.contiguous(),
            zeros=take(zeros, 0, region.n_start, region.n),
            spec=layer.spec,
            phase=region.k_start % layer.spec.group_size,
        )

    def _option(self, *names: str) -> object:
        """The first of several spellings: config.json and quant_config.json differ."""
        return next((self.config[name] for name in names if name in self.config), None)
