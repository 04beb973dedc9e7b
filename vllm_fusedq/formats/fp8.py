"""`quant_method: fp8`: 8-bit floats as DeepSeek, Qwen and transformers' finegrained_fp8 store them.

weight_scale_inv `[ceil(N / rows), ceil(K / columns)]` multiplies each block of `weight_block_size`
(its name notwithstanding); without blocks weight_scale or weight_scale_inv is one number. Source:
`Fp8LinearMethod` of vLLM, `FP8Linear` of transformers, and AutoFP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.formats.float8 import Float8Format
from vllm_fusedq.formats.float8_packing import BLOCKS, Float8Packing, ScaleOf, is_block
from vllm_fusedq.formats.shared.rows import Support

SCALE, BLOCK_SCALE = "weight_scale", "weight_scale_inv"
ACTIVATION_SCHEMES = ("dynamic", "static")
# What AutoFP8 calls "static"
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor"}


class Fp8Format(Float8Format):
    """`quant_method: fp8`, weights that are 8-bit floats already."""

    name = "fp8"
    reads_stacks = True
    markers = frozenset({SCALE, BLOCK_SCALE})
    of_activations = ("input_scale", "activation_scale")
    support = (
        Support(
            '`fp8` (W8A8), its weights by `"activations": "16-bit"`',
            "8 bits (E4M3)",
            "floats",
            groups="blocks of any size, per tensor",
        ),
    )
    exclusion = "modules_to_not_convert"
    grouping = "weight_block_size"

    def check_config(self) -> None:
        kind = self.config.get("fmt")
        if kind not in ("e4m3", None):
            raise self.refusal(f"fmt {kind!r:.80}", "fmt e4m3")
        if store := self.config.get("store_dtype"):
            raise self.refusal(f"store_dtype {store!r:.80}", "weights of 8 bits")
        self.activation_scheme = self.config.get("activation_scheme")
        if self.activation_scheme not in ACTIVATION_SCHEMES:
            known = f"activation_scheme {' or '.join(ACTIVATION_SCHEMES)}"
            raise self.refusal(f"activation_scheme {self.activation_scheme!r:.80}", known)
        self.block = self.config.get("weight_block_size")
        if self.block is not None and not is_block(self.block):
            raise self.refusal(f"weight_block_size {self.block!r:.80}", f"null or {BLOCKS}")

    def activations(self, module: str) -> str:
        return f"8-bit float, {self.activation_scheme}"

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        found = super().kv_cache_scheme
        return KV_CACHE if found == "static" else found

    def packing_of(self, stored: Mapping[str, TensorInfo]) -> tuple[Float8Packing, int]:
        names = (SCALE, BLOCK_SCALE) if self.block is None else (BLOCK_SCALE, SCALE)
        scale = next((name for name in names if name in stored), names[0])
        if self.block is None:
            return Float8Packing(scale=scale, scale_of=ScaleOf.TENSOR), -1
        rows, group_size = self.block
        name = f"{rows}x{group_size}"
        packing = Float8Packing(name=name, scale=scale, scale_of=ScaleOf.BLOCK, rows=rows)
        return packing, group_size
