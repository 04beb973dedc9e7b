"""compressed-tensors checkpoints (llm-compressor): which modules are quantized, and how.

`compressed_tensors_packing.py` has the tensors. Source: `QuantizationConfig` and `dequantize` of
the compressed_tensors package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.compressed_tensors_packing import (
    G_IDX,
    SCALE,
    SHAPE,
    BytePacking,
    CompressedTensorsPacking,
    WordPacking,
)
from vllm_fusedq.formats.float4_packing import (
    MXFP4,
    MXFP4_GROUP,
    NVFP4,
    NVFP4_GROUP,
    Float4Packing,
)
from vllm_fusedq.formats.float8_packing import (
    BLOCKS,
    MXFP8_GROUP,
    Float8Packing,
    ScaleOf,
    is_block,
)
from vllm_fusedq.formats.headers import unread
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.shared.rows import Support, bit_widths
from vllm_fusedq.formats.shared.vocabulary import is_input_embedding
from vllm_fusedq.names import without_prefix

_Packing: TypeAlias = CompressedTensorsPacking | Float4Packing | Float8Packing

BITS = range(2, 9)
WORDS, BYTES = "pack-quantized", ("int-quantized", "naive-quantized")
FLOAT = "float-quantized"
# What a group of them has to be: its strategy and size
FLOATS_IN_GROUPS: dict[str, tuple[Float4Packing | Float8Packing, str, int]] = {
    "nvfp4-pack-quantized": (NVFP4, "tensor_group", NVFP4_GROUP),
    "mxfp4-pack-quantized": (MXFP4, "group", MXFP4_GROUP),
    "mxfp8-quantized": (
        Float8Packing(name="mxfp8", scale=SCALE.name, scale_of=ScaleOf.BLOCK, exponents=True),
        *("group", MXFP8_GROUP),
    ),
}
PACKINGS = (WORDS, *BYTES, FLOAT, *FLOATS_IN_GROUPS)
# Of weights only, the package calls floats naive-quantized
FLOAT_PACKINGS = (FLOAT, "naive-quantized")
FLOAT_BITS = 8
KNOWN_WEIGHTS = (
    f"{BITS[0]}- to {BITS[-1]}-bit int weights, pack-quantized or int-quantized, and "
    f"{FLOAT_BITS}-bit float ones, {FLOAT}"
)
FLOAT_STRATEGIES = ("tensor", "channel", "group", "block")
# 3-, 5-, 6- and 7-bit codes straddle words from this version of the package on
FIRST_STREAMING_VERSION = (0, 18)
# What says how to quantize activations, where that is not found as they come
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")
LINEAR_CLASS = "Linear"
EMBEDDING_CLASS = "Embedding"
# Both only change how the quantizer calibrates, not what it stores
HARMLESS_ORDERS = (None, False, "static", "weight")
STORED_ORDERS = ("group", "dynamic")
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
        packing, symmetric, group_size = self._read_weights(name, weights, stored_as)
        targets = self.check_names("targets", group)
        unprefixed = frozenset(without_prefix(name) for name in targets if "." in name)
        activations = f"{inputs.get('num_bits')}-bit {inputs.get('type', 'int')}" if inputs else ""
        return _Group(targets, unprefixed, packing, symmetric, group_size, activations)

    def _read_weights(
        self, name: str, weights: dict[str, Any], stored_as: str
    ) -> tuple[_Packing, bool, int]:
        """Packing, whether it is symmetric, and group size."""
        if stored_as in FLOATS_IN_GROUPS:
            return self._read_floats_in_groups(name, weights, stored_as)
        if weights.get("type") == "float" and stored_as in FLOAT_PACKINGS:
            return self._read_floats(name, weights)
        bits = weights.get("num_bits")
        known_bits = type(bits) is int and bits in BITS
        if not known_bits or weights.get("type", "int") != "int" or stored_as == FLOAT:
            found = f"{bits!r:.80}-bit {weights.get('type')} weights in {name}, {stored_as}"
            raise self.refusal(found, KNOWN_WEIGHTS)
        if weights.get("dynamic"):
            raise self.refusal(f"dynamic weights in {name}", "static weights")
        order = weights.get("actorder")
        if order not in (*HARMLESS_ORDERS, *STORED_ORDERS):
            known = "actorder null, static, weight, group or dynamic"
            raise self.refusal(f"actorder {order!r:.80} in {name}", known)
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise self.refusal(f"symmetric {symmetric!r:.80} in {name}", "symmetric true or false")
        group_size = self._group_size(name, weights)
        ordered = order in STORED_ORDERS and group_size != -1
        if stored_as in BYTES:
            packing = BytePacking(bits=bits, ordered=ordered, name=stored_as)
        else:
            packing = self._word_packing(bits, ordered, name)
        return packing, symmetric, group_size

    def _read_floats(self, name: str, weights: dict[str, Any]) -> tuple[Float8Packing, bool, int]:
        """`_read_weights` of floats."""
        expected = {"num_bits": (FLOAT_BITS,), "symmetric": (True, None), "dynamic": (False, None)}
        expected["actorder"] = HARMLESS_ORDERS
        for key, known in expected.items():
            if weights.get(key) not in known:
                raise self.refusal(
                    f"float weights with {key} {weights.get(key)!r:.80} in {name}",
                    f"{FLOAT_BITS}-bit float weights, static, symmetric and without reordering",
                )
        strategy, group_size, rows = weights.get("strategy"), -1, 1
        if strategy == "group":
            group_size = self.check_group_size(weights.get("group_size"))
        elif strategy == "block":
            block = weights.get("block_structure")
            if not is_block(block):
                raise self.refusal(f"block_structure {block!r:.80} in {name}", BLOCKS)
            rows, group_size = block
        elif strategy not in FLOAT_STRATEGIES:
            known = ", ".join(FLOAT_STRATEGIES)
            raise self.refusal(f"strategy {strategy!r:.80} of float weights in {name}", known)
        scale_of = ScaleOf.CHANNEL if group_size == -1 else ScaleOf.BLOCK
        if strategy == "tensor":
            scale_of = ScaleOf.TENSOR
        packing = Float8Packing(name=FLOAT, scale=SCALE.name, scale_of=scale_of, rows=rows)
        return packing, True, group_size

    def _read_floats_in_groups(
        self, name: str, weights: dict[str, Any], stored_as: str
    ) -> tuple[Float4Packing | Float8Packing, bool, int]:
        """`_read_weights` of NVFP4, MXFP4 and MXFP8."""
        packing, strategy, group_size = FLOATS_IN_GROUPS[stored_as]
        expected = {"num_bits": packing.bits, "type": "float"}
        expected |= {"strategy": strategy, "group_size": group_size}
        found = {key: weights.get(key) for key in expected}
        order = weights.get("actorder")
        # The package stores no order of such weights, whatever the config says of one
        if order not in HARMLESS_ORDERS:
            raise self.refusal(
                f"{stored_as} with actorder {order!r:.80} in {name}",
                "actorder null, static or weight",
            )
        if (
            found != expected
            or weights.get("dynamic")
            or weights.get("symmetric", True) is not True
        ):
            raise self.refusal(
                f"format {stored_as} with {found} in {name}",
                f"static symmetric weights, {expected}",
            )
        return packing, True, group_size

    def _word_packing(self, bits: int, ordered: bool, name: str) -> WordPacking:
        if 32 % bits == 0 or self._streams(bits, name):
            return WordPacking(bits=bits, ordered=ordered)
        return WordPacking(bits=bits, ordered=ordered, name=f"{WORDS}, padded", streaming=False)

    def _streams(self, bits: int, name: str) -> bool:
        """Whether codes straddle words, by the version of the package that packed them."""
        version = self.config.get("version")
        match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        if match is None:
            raise self.refusal(
                f"{bits}-bit weights in {name} and version {version!r:.80} of compressed-tensors",
                "a version in the config, because their packing changed with version 0.18",
                "add the version of compressed-tensors that packed the model",
            )
        return tuple(int(part) for part in match.groups()) >= FIRST_STREAMING_VERSION

    def _group_size(self, name: str, weights: dict[str, Any]) -> int:
        strategy, group_size = weights.get("strategy"), weights.get("group_size")
        if strategy == "group" or (strategy is None and group_size not in (None, -1)):
            return self.check_group_size(group_size)
        if strategy == "channel" or (strategy is None and group_size == -1):
            return -1
        raise self.refusal(f"strategy {strategy!r} in {name}", "strategy group or channel")

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


def _of_stack(module: str, packing: _Packing) -> _Packing:
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
    packing: _Packing
    symmetric: bool
    group_size: int
    activations: str
