"""`quant_method: fbgemm_fp8`: 8-bit floats and a scale for each out_feature, fp32 `[N, 1]`.

Source: `FbgemmFp8Linear` of transformers and `FBGEMMFp8LinearMethod` of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.formats.float8 import Float8Format
from vllm_fusedq.formats.float8_packing import Float8Packing, ScaleOf
from vllm_fusedq.formats.shared.rows import Support

SCALE = "weight_scale"


class FbgemmFp8Format(Float8Format):
    """`quant_method: fbgemm_fp8`, weights that are 8-bit floats already."""

    name = "fbgemm_fp8"
    markers = frozenset({SCALE})
    of_activations = ("input_scale_ub",)
    support = (
        Support(
            '`fbgemm_fp8` (W8A8), its weights by `"activations": "16-bit"`',
            "8 bits (E4M3)",
            "floats",
            groups="per channel",
        ),
    )
    exclusion = "modules_to_not_convert"

    def check_config(self) -> None:
        """Nothing of it concerns the weights."""

    def activations(self, module: str) -> str:
        return "8-bit float, per token"

    def packing_of(self, stored: Mapping[str, TensorInfo]) -> tuple[Float8Packing, int]:
        return Float8Packing(scale=SCALE, scale_of=ScaleOf.CHANNEL), -1
