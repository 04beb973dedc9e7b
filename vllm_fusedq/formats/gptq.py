"""GPTQ checkpoints as AutoGPTQ and GPTQModel store them: which modules are quantized, and how.

`gptq_packing.py` has the tensors. checkpoint_format "gptq" (v1) stores zero points minus one,
"gptq_v2" as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_fusedq.formats.base import CheckpointFormat
from vllm_fusedq.formats.gptq_packing import BITS, GptqPacking
from vllm_fusedq.formats.gptq_zeros import ZERO_OFFSETS
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.shared.rows import Support, bit_widths

STORED_OVERRIDES = frozenset({"bits", "group_size", "sym", "desc_act", "pack_dtype"})
# The others only change how the quantizer calibrates, not what it stores
OVERRIDES = STORED_OVERRIDES | {"act_group_aware", "damp_auto_increment", "damp_percent", "mse"}


class GptqFormat(CheckpointFormat):
    """`quant_method: gptq`, checkpoint_format gptq or gptq_v2, symmetric or with zero points."""

    name = "gptq"
    config_sources = ("quantize_config.json",)
    markers = frozenset({"qweight", "qzeros", "g_idx"})
    leftovers = frozenset({"scales"})
    support = (
        Support(
            "GPTQ `gptq` and `gptq_v2`, also `desc_act` (act-order), `dynamic`, `lm_head`",
            bit_widths(BITS),
            "symmetric and asymmetric",
        ),
    )
    exclusion = '"-:regex" in dynamic'
    head_setting = "the entry lm_head"
    grouping = "the group_size of GPTQModel's QuantizeConfig"
    without_order = "desc_act false in GPTQModel's QuantizeConfig"

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
        return not self.excludes(module)

    def lists(self, module: str) -> bool:
        return self._options_of(module) is None

    def claims_head(self, module: str) -> bool:
        return self.config.get("lm_head") is True and not self.excludes(module)

    def scheme(self, module: str) -> Scheme:
        options = self._options_of(module)
        assert options is not None
        packing = GptqPacking(
            bits=options.bits, ordered=options.ordered, zero_offset=self.zero_offset
        )
        return packing.scheme(
            self.checkpoint.modules()[module], options.group_size, symmetric=options.symmetric
        )

    def _read_options(self, config: Mapping[str, Any], where: str = "") -> _Options:
        """What the config, or the config with one module's overrides, says of a module."""
        bits = config.get("bits")
        if type(bits) is not int or bits not in BITS:
            raise self.refusal(f"bits {bits!r:.80}{where}", f"bits {', '.join(map(str, BITS))}")
        group_size = self.check_group_size(config.get("group_size"))
        if config.get("pack_dtype", "int32") != "int32":
            raise self.refusal(f"pack_dtype {config['pack_dtype']!r}{where}", "pack_dtype int32")
        symmetric = config.get("sym", True)
        if not isinstance(symmetric, bool):
            raise self.refusal(f"sym {symmetric!r}{where}", "sym true or false")
        # One group has no order, and static groups are stored in the order of in_features
        plain = group_size == -1 or bool(config.get("static_groups"))
        return _Options(bits, group_size, symmetric, bool(config.get("desc_act")) and not plain)

    def _inclusions(self, blocks: object) -> list[str]:
        """transformers' `modules_in_block_to_quantize`: a list of names, or of lists of names."""
        lists = blocks if isinstance(blocks, list) else [blocks]
        names = [name for b in lists for name in (b if isinstance(b, list) else [b])]
        if all(isinstance(name, str) for name in names):
            return names
        raise self.refusal(f"modules_in_block_to_quantize {blocks!r:.80}", "lists of names")

    def _rules(self, dynamic: object) -> list[tuple[re.Pattern[str], _Options | None]]:
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

    def _options_of(self, module: str) -> _Options | None:
        """None where a rule excludes the module."""
        for pattern, options in self.rules:
            if pattern.match(module):
                return options
        return self.options


class _Options(NamedTuple):
    """`ordered`: g_idx may say anything (activation reordering)."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
