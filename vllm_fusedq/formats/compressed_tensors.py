"""compressed-tensors checkpoints (llm-compressor): which modules are quantized, and how.

`compressed_tensors_packing.py` has the tensors, `compressed_tensors_weights.py` reads how those of
a group are packed. Source: `QuantizationConfig` and `dequantize` of the compressed_tensors package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.compressed_tensors_packing import G_IDX, SHAPE, WordPacking
from vllm_fusedq.formats.compressed_tensors_weights import (
    BITS,
    FLOATS_IN_GROUPS,
    PACKINGS,
    AnyPacking,
    read_weights,
)
from vllm_fusedq.formats.headers import unread
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.shared.rows import Support, bit_widths
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding
from vllm_fusedq.names import without_prefix

# What says how to quantize activations, where that is not found as they come
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")
LINEAR_CLASS = "Linear"
EMBEDDING_CLASS = "Embedding"
REFUSED_SECTIONS = {
    "sparsity_config": "sparse weights (sparsity_config)",
    "transform_config": "transformed weights (transform_config)",
}


class CompressedTensorsFormat(CheckpointFormat):
    """`quant_method: compressed-tensors`, the formats of `PACKINGS`, weights only."""

    name = "compressed-tensors"
    reads_stacks = True
    config_sources = ("compression_config",)
    markers = frozenset(
        {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
    )
    support = (
        Support(
            "compressed-tensors `pack-quantized`, weight-only, any `actorder`, also `lm_head`, "
            "input embeddings, tied or not",
            bit_widths(BITS),
            "symmetric and asymmetric",
        ),
        Support(
            "compressed-tensors `int-quantized` and `naive-quantized`, weight-only (W8A16)",
            f"{bit_widths(BITS)} in int8",
            "symmetric and asymmetric",
        ),
        Support(
            "compressed-tensors `float-quantized`, weight-only (W8A16), or W8A8 by "
            '`"activations": "16-bit"`',
            "8 bits (E4M3)",
            "floats",
            groups="multiples of 8, blocks, per channel, per tensor",
        ),
        *(
            Support(
                f"compressed-tensors `{name}`, weight-only, or W{packing.bits}A{packing.bits} by "
                '`"activations": "16-bit"`',
                "4 bits (E2M1)" if packing.bits == 4 else "8 bits (E4M3)",
                "floats",
                groups=str(group),
            )
            for name, (packing, _, group) in FLOATS_IN_GROUPS.items()
        ),
    )
    exclusion = "ignore"
    head_setting = embedding_setting = "targets and ignore"
    grouping = "the group_size in the weights of llm-compressor's config_groups"
    without_order = "actorder static in llm-compressor's GPTQModifier"

    def check_config(self) -> None:
        for key, found in REFUSED_SECTIONS.items():
            section = self.config.get(key)
            if section and section != {"format": "dense"}:
                raise self.refusal(found, "quantized weights and nothing else")
        self.excluded = self.check_names("ignore")
        groups = self.config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.refusal(f"config_groups {groups!r:.80}", "at least one group of modules")
        self.groups = [self._read_group(name, group) for name, group in groups.items()]
        for target in (*self.excluded, *(t for group in self.groups for t in group.targets)):
            if target.startswith("re:"):
                self.check_regex(target[3:])

    def claims(self, module: str) -> bool:
        return not self.excludes(module) and self._group_of(module) is not None

    def lists(self, module: str) -> bool:
        return self._matches(module, self.excluded) or _class_of(module) in self.excluded

    def claims_head(self, module: str) -> bool:
        return self.claims(module)

    def claims_embedding(self, module: str) -> bool:
        return self.claims(module)

    def scheme(self, module: str) -> Scheme:
        group = self._group_of(module)
        assert group is not None
        stored = self.checkpoint.modules()[module]
        if G_IDX.name in stored and not group.packing.ordered:
            raise PreflightError.single(
                module,
                "weight_g_idx (activation reordering) although the config says nothing of it",
                "weight_g_idx with actorder group",
                "set actorder to group in the config if this model was quantized with it",
            )
        packing, unused = group.packing, OF_ACTIVATIONS if group.activations else ()
        if any(info.piece for info in stored.values()):
            packing, unused = _of_stack(module, packing), (*unused, SHAPE.name)
        scheme = packing.scheme(stored, group.group_size, symmetric=group.symmetric)
        return replace(scheme, layouts=(*scheme.layouts, *unread(stored, unused)))

    def activations(self, module: str) -> str:
        group = self._group_of(module)
        return "" if group is None else group.activations

    def _read_group(self, name: str, group: Any) -> _Group:
        """One of config_groups."""
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise self.refusal(f"{name} without a weights section", "groups that describe weights")
        if group.get("output_activations"):
            raise self.refusal(
                f"quantized outputs ({name}.output_activations)",
                "quantized weights and inputs",
                "quantize the original model again with a weight-only scheme of "
                f"llm-compressor (W4A16, W8A16), or {USE_VLLM}",
            )
        inputs = group.get("input_activations") or {}
        if not isinstance(inputs, dict):
            raise self.refusal(f"input_activations {inputs!r:.80} in {name}", "a JSON object")
        stored_as = group.get("format") or self.config.get("format")
        if stored_as not in PACKINGS:
            raise self.refusal(
                f"format {stored_as!r:.80} of {name}", f"format {' or '.join(PACKINGS)}"
            )
        weights = group["weights"]
        packing, symmetric, group_size = read_weights(self, name, weights, stored_as)
        targets = self.check_names("targets", group)
        unprefixed = frozenset(without_prefix(name) for name in targets if "." in name)
        activations = f"{inputs.get('num_bits')}-bit {inputs.get('type', 'int')}" if inputs else ""
        return _Group(targets, unprefixed, packing, symmetric, group_size, activations)

    def _group_of(self, module: str) -> _Group | None:
        """The group that targets a module: a name or regex wins over its class."""
        named = (group for group in self.groups if self._matches(module, group.targets))
        moved = (group for group in self.groups if without_prefix(module) in group.unprefixed)
        of_class = (group for group in self.groups if _class_of(module) in group.targets)
        return next(chain(named, moved, of_class), None)

    def _matches(self, module: str, targets: Iterable[str]) -> bool:
        """By name or regex."""
        for target in targets:
            if target == module:
                return True
            if target.startswith("re:") and self.check_regex(target[3:]).match(module):
                return True
        return False


def _of_stack(module: str, packing: AnyPacking) -> AnyPacking:
    """The packing of an expert whose tensors are pieces of those of all experts.

    Raises:
        PreflightError: gate and up have one order of in_features between them.
    """
    if packing.ordered:
        raise PreflightError.single(
            module,
            "actorder group of experts that are stored all at once",
            "such experts with actorder static or none, or experts stored one by one",
            "quantize the model again with a tool that stores experts one by one",
        )
    return replace(packing, shaped=False) if isinstance(packing, WordPacking) else packing


def _class_of(module: str) -> str:
    """The class of torch.nn that a target may name."""
    return EMBEDDING_CLASS if is_input_embedding(module) else LINEAR_CLASS


class _Group(NamedTuple):
    """The modules of a group, and how they are quantized; `group_size` -1 is all of K.

    `unprefixed` are the names among the targets without their prefix, which may be another one than
    the file's.
    """

    targets: list[str]
    unprefixed: frozenset[str]
    packing: AnyPacking
    symmetric: bool
    group_size: int
    activations: str
