"""GPTQ checkpoints as AutoGPTQ and GPTQModel store them, 4-bit.

qweight int32 `[K / 8, N]` packs in_features and qzeros int32 `[G, N / 8]` out_features, both in
order from the lowest nibble; scales `[G, N]`; g_idx int32 `[K]` is each in_feature's group, any
group with activation reordering (desc_act), else `k // group_size` and often missing.
checkpoint_format "gptq" (v1) stores zero points minus one, "gptq_v2" as they are.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fusedq_kernels.types import LogicalWeight, WeightType
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.formats.base import (
    CheckpointFormat,
    Dim,
    LayerFormat,
    Region,
    Scheme,
    TensorLayout,
    check_slices,
)
from vllm_fusedq.formats.layer import SCALE_DTYPES, with_all_groups
from vllm_fusedq.formats.ordering import sort_rows
from vllm_fusedq.formats.unpacking import NIBBLES, take, unpack_columns, unpack_rows

LAYOUTS = (
    TensorLayout("qweight", (Dim("k", 8), Dim("n")), (torch.int32,)),
    TensorLayout("qzeros", (Dim("g"), Dim("n", 8)), (torch.int32,)),
    TensorLayout("scales", (Dim("g"), Dim("n")), SCALE_DTYPES),
)
G_IDX = TensorLayout("g_idx", (Dim("k"),), (torch.int32, torch.int64))

STORED_OVERRIDES = frozenset({"bits", "group_size", "sym", "desc_act", "pack_dtype"})
# The others only change how the quantizer calibrates, not what it stores
OVERRIDES = STORED_OVERRIDES | {"act_group_aware", "damp_auto_increment", "damp_percent", "mse"}

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
SYMMETRIC_ZERO = 8


class GptqFormat(CheckpointFormat):
    """`quant_method: gptq`, checkpoint_format gptq or gptq_v2, symmetric or with zero points."""

    name = "gptq"
    config_sources = ("quantize_config.json",)
    markers = frozenset({"qweight", "qzeros", "g_idx"})
    exclusion = '"-:regex" in dynamic'

    def check_config(self) -> None:
        config = self.config
        checkpoint_format = config.get("checkpoint_format") or config.get("format") or "gptq"
        if checkpoint_format not in list(ZERO_OFFSETS) or config.get("is_marlin_format"):
            found = "marlin" if config.get("is_marlin_format") else checkpoint_format
            raise self.refusal(f"checkpoint_format {found!r}", " or ".join(ZERO_OFFSETS))
        self.zero_offset = ZERO_OFFSETS[checkpoint_format]
        if config.get("rotation"):
            raise self.refusal(f"rotation {config['rotation']!r}", "weights without rotation")
        self.options = self._read_options(config)
        self.rules = self._rules(config.get("dynamic") or {})
        self.included = self._inclusions(config.get("modules_in_block_to_quantize") or [])

    def claims(self, module: str) -> bool:
        # GPTQ quantizers convert the linears of the decoder blocks; lm_head is no concern of theirs
        if self.block_of(module) not in self.quantized_blocks:
            return False
        if self.included and not any(name in module for name in self.included):
            return False
        return self._options_of(module) is not None

    def scheme(self, module: str) -> Scheme:
        options = self._options_of(module)
        assert options is not None
        stored = self.checkpoint.modules()[module]
        layouts = LAYOUTS
        if options.ordered and "qweight" in stored:
            k = NIBBLES * next(iter(stored["qweight"].shape), 0)
            layouts = with_all_groups(LAYOUTS, -(-k // options.group_size))
        with_g_idx = options.ordered or "g_idx" in stored
        return Scheme(
            WeightType.UINT4B8 if options.symmetric else WeightType.UINT4,
            options.group_size,
            (*layouts, G_IDX) if with_g_idx else layouts,
            scales="scales",
            zero_offset=self.zero_offset,
            ordered=options.ordered,
        )

    @staticmethod
    def decode(
        tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, "scales")
        stored = take(unpack_rows(tensors["qzeros"].T), 0, region.n_start, region.n)
        zeros = _zeros(stored, layer)
        codes = take(unpack_columns(tensors["qweight"].T), 1, region.k_start, region.k)
        scales = tensors["scales"].T.contiguous()
        if layer.ordered:
            return sort_rows(codes, scales, zeros, tensors["g_idx"], "g_idx", layer, region)
        if layer.tensor("g_idx"):
            _check_order(tensors["g_idx"], layer, region)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)

    def _read_options(self, config: Mapping[str, Any], where: str = "") -> "_Options":
        """What the config, or the config with one module's overrides, says of a module."""
        if config.get("bits") != 4:
            raise self.refusal(f"bits {config.get('bits')!r}{where}", "4 bits")
        group_size = self.check_group_size(config.get("group_size"))
        if config.get("pack_dtype", "int32") != "int32":
            raise self.refusal(f"pack_dtype {config['pack_dtype']!r}{where}", "pack_dtype int32")
        symmetric = config.get("sym", True)
        if not isinstance(symmetric, bool):
            raise self.refusal(f"sym {symmetric!r}{where}", "sym true or false")
        # One group has no order, and static groups are stored in the order of in_features
        plain = group_size == -1 or bool(config.get("static_groups"))
        return _Options(group_size, symmetric, bool(config.get("desc_act")) and not plain)

    def _inclusions(self, blocks: object) -> list[str]:
        """transformers' `modules_in_block_to_quantize`: a list of names, or of lists of names."""
        lists = blocks if isinstance(blocks, list) else [blocks]
        names = [name for b in lists for name in (b if isinstance(b, list) else [b])]
        if all(isinstance(name, str) for name in names):
            return names
        raise self.refusal(f"modules_in_block_to_quantize {blocks!r:.80}", "lists of names")

    def _rules(self, dynamic: object) -> list[tuple[re.Pattern[str], "_Options | None"]]:
        """GPTQModel's `dynamic`: the first regex that matches a module decides.

        "-:regex" excludes a module; "+:regex" or a bare one overrides entries of the config.
        """
        if not isinstance(dynamic, dict):
            raise self.refusal(f"dynamic {dynamic!r:.80}", "dynamic as a JSON object")
        rules = []
        for rule, overrides in dynamic.items():
            pattern = self.check_regex(rule.removeprefix("-:").removeprefix("+:"))
            if rule.startswith("-:"):
                rules.append((pattern, None))
                continue
            where = f" in the dynamic rule {rule!r:.80}"
            if not isinstance(overrides, dict):
                raise self.refusal(f"{overrides!r:.80}{where}", "a JSON object of overrides")
            if unknown := sorted(overrides.keys() - OVERRIDES):
                found = f"{unknown[0]} {overrides[unknown[0]]!r:.40}{where}"
                known = ", ".join(sorted(STORED_OVERRIDES))
                raise self.refusal(found, f"overrides of {known} per module")
            rules.append((pattern, self._read_options({**self.config, **overrides}, where)))
        return rules

    def _options_of(self, module: str) -> "_Options | None":
        """None where a rule excludes the module."""
        for pattern, options in self.rules:
            if pattern.match(module):
                return options
        return self.options


class _Options(NamedTuple):
    """`ordered`: g_idx may say anything (activation reordering)."""

    group_size: int
    symmetric: bool
    ordered: bool


def _zeros(stored: torch.Tensor, layer: LayerFormat) -> torch.Tensor | None:
    low, high = (int(bound) for bound in stored.aminmax())
    if not layer.spec.has_zero_points:
        # sym leaves no other zero point than 8, so a checkpoint that names the wrong one of the
        # two formats (they exist, with either error) is still read without doubt
        if low == high and low + 1 in (SYMMETRIC_ZERO, SYMMETRIC_ZERO + 1):
            return None
        found = f"{low}" if low == high else f"{low} to {high}"
        raise WeightLoadError(
            f"{layer.module}.qzeros: found stored zero points {found} although the config says "
            f"sym true, expected {SYMMETRIC_ZERO - layer.zero_offset} everywhere (zero point "
            f"{SYMMETRIC_ZERO}); set sym to false in the config if this model has zero points"
        )
    if high + layer.zero_offset > 15:
        raise WeightLoadError(
            f"{layer.module}.qzeros: found a stored zero point {high}, which in "
            "checkpoint_format gptq is 16, or 0 after an underflow; supported are zero points that "
            "fit 4 bits; set checkpoint_format to gptq_v2 in the config if they are stored as they "
            "are, or quantize again"
        )
    return stored + layer.zero_offset


def _check_order(g_idx: torch.Tensor, layer: LayerFormat, region: Region) -> None:
    rows = torch.arange(region.k_start, region.k_stop, device=g_idx.device)
    wrong = (g_idx != rows // layer.spec.group_size).nonzero()
    if len(wrong):
        row = int(wrong[0])
        k = region.k_start + row
        raise WeightLoadError(
            f"{layer.module}.g_idx: found in_feature {k} in group {int(g_idx[row])} "
            f"({len(wrong)} of {region.k} in_features are out of order), expected group "
            f"{k // layer.spec.group_size} of size {layer.spec.group_size} without activation "
            "reordering; set desc_act to true and static_groups to false in the config if this "
            "model was quantized with it"
        )
