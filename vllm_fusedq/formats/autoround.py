"""AutoRound checkpoints with integer weights: GPTQ's or AWQ's tensors under a config of their own.

`packing_format` ("auto_round:auto_gptq"; `backend` before AutoRound 0.5) names the tensors; what
else it names is the kernel that the tool would run. `extra_config` gives modules options of their
own, by name or by a regex to search for. Source: `export_to_autoround/export.py`,
`inference/convert_model.py` and `utils/bit_packing.py` of AutoRound 0.16, and the exporters of 0.2
to 0.5; vLLM reads the same configs in `quantization/inc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from vllm_fusedq.formats.awq_packing import GemmPacking
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.gptq_packing import GptqPacking
from vllm_fusedq.formats.gptq_zeros import Conventions
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.shared.rows import Support, bit_widths
from vllm_fusedq.names import without_prefix

BITS = (2, 3, 4, 5, 6, 7, 8)
AWQ_BITS = (4, 5, 6, 7)
UNQUANTIZED_BITS = 16
DEFAULT_PACKING = "auto_round:auto_gptq"
CONVENTIONS = Conventions("packing_format", DEFAULT_PACKING, "auto_round")

# Of a packing_format's parts, the ones that name tensors; by zero offset where they are GPTQ's
ZERO_OFFSETS = {"auto_gptq": 1, "gptq": 1, "gptqmodel": 0, "auto_round": 0}
AWQ_NAMES = ("auto_awq", "awq")
NAMED = ("auto_gptq", "gptqmodel", "auto_awq")
KERNELS = ("exllamav1", "exllamav2", "triton", "tritonv2", "cuda")

REFUSED_OPTIONS = {
    "rotation_config": "rotated weights",
    "spinquant_config": "rotated weights",
    "static_kv_dtype": "a quantized KV cache",
    "static_attention_dtype": "quantized attention",
}


class AutoRoundFormat(CheckpointFormat):
    """`quant_method: auto-round` (`intel/auto-round` before 0.5), data_type int."""

    name = "auto-round"
    other_names = ("intel/auto-round",)
    config_sources = ("quantization_config.json",)
    markers = frozenset({"qweight", "qzeros"})
    leftovers = frozenset({"scales"})
    support = (
        Support(
            "AutoRound `auto_round`, `auto_round:auto_gptq`, also `extra_config`, `lm_head`",
            bit_widths(BITS),
            "symmetric and asymmetric",
        ),
        Support("AutoRound `auto_round:auto_awq`", bit_widths(AWQ_BITS), "yes"),
    )
    exclusion = "bits 16 in extra_config"
    head_setting = "the entry lm_head in extra_config"
    grouping = "AutoRound's group_size"

    def check_config(self) -> None:
        for option, meaning in REFUSED_OPTIONS.items():
            if self.config.get(option):
                found = f"{option} {self.config[option]!r:.80}"
                raise self.refusal(f"{found} ({meaning})", "weights of linear layers alone")
        self.packing = self._packing()
        self.options = self._read_options(self.config)
        self.blocks = self._blocks()
        extra = self.config.get("extra_config") or {}
        if not isinstance(extra, dict):
            raise self.refusal(f"extra_config {extra!r:.80}", "extra_config as a JSON object")
        self.overrides = {name: self._override(name, each) for name, each in extra.items()}
        self.rules = {
            name: self.check_regex(name) for name in extra if name not in self.checkpoint.modules()
        }
        self.excluded = [name for name, options in self.overrides.items() if options is None]

    def claims(self, module: str) -> bool:
        if self.blocks:
            inside = any(_lies_in(module, block) for block in self.blocks)
        else:
            inside = self.block_of(module) in self.quantized_blocks
        return (inside or self._named_outside(module)) and not self.excludes(module)

    def lists(self, module: str) -> bool:
        return self._options_of(module) is None

    def claims_head(self, module: str) -> bool:
        return self._named_outside(module) and not self.excludes(module)

    def scheme(self, module: str) -> Scheme:
        options = self._options_of(module)
        assert options is not None
        stored = self.checkpoint.modules()[module]
        if self.packing in AWQ_NAMES:
            packing = GemmPacking(bits=options.bits, interleaved=True, name=AWQ_NAMES[0])
            return packing.scheme(module, stored, options.group_size)
        offset = ZERO_OFFSETS[self.packing]
        packing = GptqPacking(bits=options.bits, zero_offset=offset, conventions=CONVENTIONS)
        return packing.scheme(stored, options.group_size, symmetric=options.symmetric)

    def _packing(self) -> str:
        """The part of `packing_format` that names the tensors."""
        found = self.config.get("packing_format")
        if found is None:
            # Since packing_format exists, backend is the kernel to run, with "auto" for any
            found = self.config.get("backend")
        parts = (DEFAULT_PACKING if found in (None, "auto") else str(found)).split(":")
        known = [part for part in parts if part in ZERO_OFFSETS or part in AWQ_NAMES]
        if not known or set(parts) - set(known) - set(KERNELS):
            raise self.refusal(
                f"packing_format {found!r:.80}",
                f"auto_round, {', '.join(f'auto_round:{name}' for name in NAMED)}",
                f"export again with format auto_round, or {USE_VLLM}",
            )
        return known[-1]

    def _blocks(self) -> list[str]:
        """Beginnings of the names of quantized modules, empty where the file has to tell."""
        found = self.config.get("block_name_to_quantize") or self.config.get("to_quant_block_names")
        lists = found.split(",") if isinstance(found, str) else found or []
        lists = lists if isinstance(lists, list) else [lists]
        names = [name for each in lists for name in (each if isinstance(each, list) else [each])]
        if all(isinstance(name, str) and name.strip() for name in names):
            return [name.strip() for name in names]
        raise self.refusal(f"block_name_to_quantize {found!r:.80}", "names of blocks")

    def _override(self, name: str, entry: object) -> _Options | None:
        where = f" in extra_config of {name!r:.80}"
        if not isinstance(entry, dict):
            raise self.refusal(f"{entry!r:.80}{where}", "a JSON object of options")
        given = {key: value for key, value in entry.items() if value is not None}
        return self._read_options({**self.config, **given}, where)

    def _read_options(self, config: Mapping[str, Any], where: str = "") -> _Options | None:
        """What the config, or the config with one module's entry, says; None: unquantized."""
        bits = config.get("bits")
        if type(bits) is int and bits >= UNQUANTIZED_BITS:
            return None
        data_type = config.get("data_type") or "int"
        if data_type != "int":
            raise self.refusal(f"data_type {data_type!r:.80}{where}", "data_type int")
        act_bits = config.get("act_bits")
        if act_bits is not None and (type(act_bits) is not int or act_bits < UNQUANTIZED_BITS):
            found = f"act_bits {act_bits!r:.80}{where} (quantized activations)"
            raise self.refusal(found, "activations in 16 bits")
        known = AWQ_BITS if self.packing in AWQ_NAMES else BITS
        if type(bits) is not int or bits not in known:
            packing = f" with packing {self.packing}"
            raise self.refusal(
                f"bits {bits!r:.80}{where}", f"bits {', '.join(map(str, known))}{packing}"
            )
        symmetric = config.get("sym", True)
        if not isinstance(symmetric, bool):
            raise self.refusal(f"sym {symmetric!r:.80}{where}", "sym true or false")
        return _Options(bits, self.check_group_size(config.get("group_size")), symmetric)

    def _options_of(self, module: str) -> _Options | None:
        """None where the config leaves the module unquantized."""
        key = self._key_of(module)
        return self.options if key is None else self.overrides[key]

    def _key_of(self, module: str) -> str | None:
        """The entry of extra_config that decides: by name, by another prefix, the first regex."""
        if module in self.overrides:
            return module
        other = self._overrides_unprefixed.get(without_prefix(module))
        if other is not None:
            return other
        return next((key for key, rule in self.rules.items() if rule.search(module)), None)

    def _named_outside(self, module: str) -> bool:
        """Whether extra_config speaks of a module that lies in none of the quantized blocks."""
        key = self._key_of(module)
        if key is None:
            return False
        # The tool searches the blocks with a regex, and other layers only where it finds none
        rule = self.rules.get(key)
        return rule is None or not any(map(rule.search, self._in_blocks))

    @cached_property
    def _overrides_unprefixed(self) -> dict[str, str]:
        """Names of quantized modules by what they are without their prefix."""
        named = [name for name, options in self.overrides.items() if options is not None]
        return {without_prefix(name): name for name in named if name in self.rules}

    @cached_property
    def _in_blocks(self) -> list[str]:
        """The modules that are quantized without an entry of their own."""
        return [module for module in self.packed if self.block_of(module) is not None]


class _Options(NamedTuple):
    bits: int
    group_size: int
    symmetric: bool


def _lies_in(module: str, block: str) -> bool:
    return module.startswith(block) or without_prefix(module).startswith(without_prefix(block))
