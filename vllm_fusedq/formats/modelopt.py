"""NVIDIA ModelOpt checkpoints: which modules are quantized, and by which algorithm.

The section is in config.json (`quant_method: modelopt`, names to leave alone under `ignore`) or, as
older versions wrote it, in hf_quant_config.json under `quantization` (`exclude_modules`). With
MIXED_PRECISION each of `quantized_layers` names an algorithm of its own, and the rest is left
alone. Source: `export/quant_utils.py` of ModelOpt; vLLM reads the same configs in
`quantization/modelopt.py`.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.float4_packing import MODELOPT_NVFP4, NVFP4_GROUP, Float4Packing
from vllm_fusedq.formats.float8_packing import MXFP8_GROUP, Float8Packing, ScaleOf
from vllm_fusedq.formats.headers import unread
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.shared.rows import Support
from vllm_fusedq.names import without_prefix

MIXED = "MIXED_PRECISION"
SCALE = "weight_scale"
BLOCK = 128
# Of activations, whose quantization is not followed
INPUT_SCALE = "input_scale"
# vLLM builds these without quantization, whatever a config says
NEVER_QUANTIZED = ("vision_tower", "vision_model", "vit_large_projector")


class Algorithm(NamedTuple):
    """How a module is stored, and what was done to its activations, in words."""

    packing: Float4Packing | Float8Packing
    group_size: int
    activations: str


_TENSOR, _CHANNEL, _BLOCK = (
    Float8Packing(name=name, scale=SCALE, scale_of=scale_of, rows=rows)
    for name, scale_of, rows in (
        ("fp8", ScaleOf.TENSOR, 1),
        ("fp8", ScaleOf.CHANNEL, 1),
        (f"fp8 {BLOCK}x{BLOCK}", ScaleOf.BLOCK, BLOCK),
    )
)
_MXFP8 = Float8Packing(name="mxfp8", scale=SCALE, scale_of=ScaleOf.BLOCK, exponents=True)
NVFP4 = "NVFP4"
ALGORITHMS = {
    NVFP4: Algorithm(MODELOPT_NVFP4, NVFP4_GROUP, "4-bit float"),
    "W4A16_NVFP4": Algorithm(MODELOPT_NVFP4, NVFP4_GROUP, ""),
    "FP8": Algorithm(_TENSOR, -1, "8-bit float"),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(_CHANNEL, -1, "8-bit float, per token"),
    # Weights only
    "FP8_PB_WO": Algorithm(_BLOCK, BLOCK, ""),
    "MXFP8": Algorithm(_MXFP8, MXFP8_GROUP, "8-bit float, per group"),
}
"""By `quant_algo`."""


def _names(bits: int) -> str:
    """The algorithms whose codes have so many bits."""
    of_bits = (name for name, each in ALGORITHMS.items() if each.packing.bits == bits)
    return ", ".join(f"`{name}`" for name in of_bits)


class ModelOptFormat(CheckpointFormat):
    """`quant_method: modelopt`, the algorithms of `ALGORITHMS`, alone or mixed."""

    name = "modelopt"
    other_names = ("modelopt_fp4", "modelopt_mixed")
    config_sources = ("hf_quant_config.json",)
    markers = frozenset({SCALE, "weight_scale_2", INPUT_SCALE})
    support = (
        Support(
            f'ModelOpt {_names(4)}; W4A4 by `"activations": "16-bit"`',
            "4 bits (E2M1)",
            "floats",
            groups=str(NVFP4_GROUP),
        ),
        Support(
            f'ModelOpt {_names(8)}, `{MIXED}` of all; W8A8 by `"activations": "16-bit"`',
            "8 bits (E4M3)",
            "floats",
            groups=f"per tensor, per channel, {MXFP8_GROUP}, blocks of {BLOCK} x {BLOCK}",
        ),
    )
    exclusion = "exclude_modules (ignore)"
    head_setting = "exclude_modules (ignore), which must not name lm_head"

    def check_config(self) -> None:
        nested = self.config.get("quantization")
        self.section: dict[str, Any] = nested if isinstance(nested, dict) else self.config
        found = self.section.get("quant_algo")
        self.algorithm = found.upper() if isinstance(found, str) else ""
        if self.algorithm not in (*ALGORITHMS, MIXED):
            raise self._refused_algorithm(found)
        key = "ignore" if "ignore" in self.section else "exclude_modules"
        self.excluded = self.check_names(key, self.section)
        self._check_group_size(self.section, NVFP4 if self.algorithm == MIXED else self.algorithm)
        listed = self.section.get("quantized_layers") or {}
        if not isinstance(listed, dict) or (self.algorithm == MIXED and not listed):
            raise self.refusal(
                f"{self.algorithm} with quantized_layers {listed!r:.80}",
                "an algorithm for each layer",
            )
        self.listed = {name: self._read_layer(name, entry) for name, entry in listed.items()}
        cache = self.section.get("kv_cache_quant_algo")
        if cache not in (None, "FP8"):
            raise self.refusal(f"kv_cache_quant_algo {cache!r:.80}", "kv_cache_quant_algo FP8")

    def claims(self, module: str) -> bool:
        if self.algorithm == MIXED:
            return self._algorithm_of(module) is not None and not self.excludes(module)
        inside = self.block_of(module) in self.quantized_blocks
        never = any(name in module for name in NEVER_QUANTIZED)
        return inside and not never and not self.excludes(module)

    def lists(self, module: str) -> bool:
        # Versions before 0.39 listed parts of names; what the file holds packed is not meant
        parts = () if module in self.packed else self.excluded
        return any(
            module.startswith(f"{name}.") or fnmatchcase(module, name) for name in self.excluded
        ) or any(f".{name}." in f".{module}." for name in parts)

    def claims_head(self, module: str) -> bool:
        listed = self.algorithm != MIXED or self._algorithm_of(module) is not None
        return module in self.packed and listed and not self.excludes(module)

    def activations(self, module: str) -> str:
        algorithm = ALGORITHMS.get(self._algorithm_of(module) or "")
        return "" if algorithm is None or self._weights_alone else algorithm.activations

    def scheme(self, module: str) -> Scheme:
        found = self._algorithm_of(module)
        algorithm = ALGORITHMS.get(found or "")
        if algorithm is None:
            raise PreflightError.single(
                module,
                f"quant_algo {found}",
                ", ".join(ALGORITHMS),
                f"quantize again with one of these, or {USE_VLLM}",
            )
        stored = self.checkpoint.modules()[module]
        scheme = algorithm.packing.scheme(stored, algorithm.group_size)
        return replace(scheme, layouts=(*scheme.layouts, *unread(stored, (INPUT_SCALE,))))

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        scheme = super().kv_cache_scheme
        if self.section.get("kv_cache_quant_algo"):
            scheme = {"num_bits": 8, "type": "float"}
        # The tool has no other strategy and does not name it
        return {"strategy": "tensor", **scheme} if isinstance(scheme, dict) else scheme

    def _read_layer(self, name: str, entry: object) -> str:
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
        if not isinstance(algorithm, str):
            raise self.refusal(f"{entry!r:.80} in quantized_layers of {name}", "a quant_algo")
        if algorithm.upper() in ALGORITHMS:
            self._check_group_size(entry, algorithm.upper())
        return algorithm.upper()

    def _check_group_size(self, section: dict[str, Any], algorithm: str) -> None:
        found, size = section.get("group_size"), ALGORITHMS[algorithm].group_size
        if size != -1 and found not in (None, size):
            raise self.refusal(f"group_size {found!r:.80}", f"group_size {size} of {algorithm}")

    def _refused_algorithm(self, found: object) -> Exception:
        known = f"quant_algo {', '.join((*ALGORITHMS, MIXED))}"
        return self.refusal(f"quant_algo {found!r:.80}", known)

    def _algorithm_of(self, module: str) -> str | None:
        """The algorithm of a module by the config; None where it leaves it alone."""
        if self.algorithm != MIXED:
            return self.algorithm
        if module in self.listed:
            return self.listed[module]
        if (found := self._listed_unprefixed.get(without_prefix(module))) is not None:
            return found
        # Experts are listed as one
        above = (name for name in self.listed if module.startswith(f"{name}."))
        return next((self.listed[name] for name in above), None)

    @cached_property
    def _listed_unprefixed(self) -> dict[str, str]:
        return {without_prefix(name): algorithm for name, algorithm in self.listed.items()}

    @cached_property
    def _weights_alone(self) -> bool:
        """Whether the config says so of every group, whatever `quant_algo` promises."""
        groups = self.section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return False
        return all(
            isinstance(g, dict) and g.get("input_activations") is None for g in groups.values()
        )
