"""AWQ checkpoints by AutoAWQ, 4-bit, and by GPTQModel in its other widths (`awq_packing.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_fusedq.formats.awq_packing import BITS, STREAMED_BITS, VERSIONS, has_padded_words
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.shared.rows import Support, bit_widths

STREAMING_TOOL = "gptqmodel"


class AwqFormat(CheckpointFormat):
    """`quant_method: awq`, version gemm, gemv or gemv_fast."""

    name = "awq"
    config_sources = ("quant_config.json",)
    markers = frozenset({"qweight", "qzeros"})
    leftovers = frozenset({"scales"})
    support = (
        Support("AWQ `gemm`", bit_widths(BITS), "yes"),
        Support("AWQ `gemm` by GPTQModel", bit_widths(sorted(BITS + STREAMED_BITS)), "yes"),
        Support(
            "AWQ `gemv` and `gemv_fast`",
            bit_widths(BITS),
            "yes",
            groups="32, 64, multiples of 32 from 128",
        ),
    )
    exclusion = "modules_to_not_convert"
    grouping = "AutoAWQ's q_group_size"

    def check_config(self) -> None:
        self.bits = self._check_bits(self._option("bits", "w_bit"))
        self.group_size = self.check_group_size(self._option("group_size", "q_group_size"))
        version = self._option("version", "checkpoint_format", "format") or "gemm"
        self.version = str(version).lower()
        if self.version not in VERSIONS:
            raise self.refusal(
                f"version {version!r}",
                f"version {', '.join(VERSIONS)} (others pack the weights differently)",
                f"quantize again with version gemm, or {USE_VLLM}",
            )
        if self.version != "gemm" and self.bits not in BITS:
            raise self.refusal(
                f"bits {self.bits} with version {self.version}",
                f"{bit_widths(BITS)} with version gemv and gemv_fast",
                f"quantize again with version gemm, or {USE_VLLM}",
            )
        if self.version != "gemm" and not has_padded_words(self.group_size):
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
        return self.block_of(module) in self.quantized_blocks and not self.excludes(module)

    def lists(self, module: str) -> bool:
        # "gate" is meant for the router beside experts, whose gate_proj the file holds packed
        whole = module in self.packed
        return any(
            f".{name}." in f".{module}." if whole else name in module for name in self.excluded
        )

    def scheme(self, module: str) -> Scheme:
        packing = VERSIONS[self.version](bits=self.bits)
        return packing.scheme(module, self.checkpoint.modules()[module], self.group_size)

    def _check_bits(self, bits: object) -> int:
        if type(bits) is int and bits in BITS:
            return bits
        named = _tools(self.config)
        if type(bits) is int and bits in STREAMED_BITS and STREAMING_TOOL in named:
            return bits
        made_by = f"made by {', '.join(named)}" if named else "made by a tool that it does not name"
        raise self.refusal(
            f"bits {bits!r:.80}, {made_by}",
            f"{bit_widths(BITS)} by any tool, {bit_widths(STREAMED_BITS)} where meta.quantizer in "
            f"the config names {STREAMING_TOOL} (others order the codes of a word differently)",
            f"quantize again with GPTQModel (method awq, format gemm), or {USE_VLLM}",
        )

    def _option(self, *names: str) -> object:
        """The first of several spellings: config.json and quant_config.json differ."""
        return next((self.config[name] for name in names if name in self.config), None)


def _tools(config: Mapping[str, Any]) -> list[str]:
    """Which tools made the checkpoint, by `meta.quantizer`: "name:version" or a list of them."""
    meta = config.get("meta")
    named = meta.get("quantizer") if isinstance(meta, dict) else None
    names = named if isinstance(named, list) else [named]
    return [name.partition(":")[0].lower()[:40] for name in names if isinstance(name, str)]
