"""AMD Quark checkpoints: which modules are quantized, and how.

The config holds what Quark calls a layer's config (`weight`, `input_tensors`, `output_tensors`,
`bias`, each null or a description) for all linears (`global_quant_config`), for a class of them
(`layer_type_quant_config`) and for names (`layer_quant_config`); `exclude` lists names to leave
alone. Names are wildcards, or regexes behind `re:`. Source: `QConfig.to_dict` and
`get_layer_quant_config` of Quark; vLLM reads the same configs in `quantization/quark`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase, translate
from typing import Any

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.base import USE_VLLM, CheckpointFormat
from vllm_fusedq.formats.float4_packing import MXFP4_GROUP, QUARK_MXFP4, Float4Packing
from vllm_fusedq.formats.float8_packing import BLOCKS, Float8Packing, ScaleOf, is_block
from vllm_fusedq.formats.headers import unread
from vllm_fusedq.formats.layer import Scheme
from vllm_fusedq.formats.quark_packing import ORDERS, SCALE, ZERO_POINT, QuarkIntPacking
from vllm_fusedq.formats.shared.rows import Support, bit_widths

GLOBAL, BY_CLASS, BY_NAME = "global_quant_config", "layer_type_quant_config", "layer_quant_config"
KV_CACHE = "kv_cache_quant_config"
LINEAR = "Linear"
# Of activations, whose quantization is not followed
INPUT_SCALE = "input_scale"
REGEX, WILD = "re:", frozenset("*?[")
# Rotations of activations: the weights alone are not the model
ONLINE_ROTATIONS = ("r3", "r4", "online_r1_rotation")
OUTPUTS = "output_tensors"
NOT_FOLLOWED = (OUTPUTS, "bias")

BLOCKED = ("fp8_e4m3", "per_block")
_STATIC = {"is_dynamic": (False, None)}
_ALONG_K = {**_STATIC, "ch_axis": (-1, 1, None)}
KNOWN: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {
    ("int4", "per_group"): {**_ALONG_K, "symmetric": (True, False)},
    ("uint4", "per_group"): {**_ALONG_K, "symmetric": (False,)},
    ("fp4", "per_group"): {**_ALONG_K, "group_size": (MXFP4_GROUP,), "scale_format": ("e8m0",)},
    ("fp8_e4m3", "per_tensor"): _STATIC,
    ("fp8_e4m3", "per_channel"): {**_STATIC, "ch_axis": (0,)},
    BLOCKED: _STATIC,
}
"""By dtype and qscheme of weights: what else their description has to say."""

_FP8 = Float8Packing(name="fp8", scale=SCALE.name, scale_of=ScaleOf.BLOCK)
FLOATS: dict[tuple[str, str], tuple[Float4Packing | Float8Packing, int]] = {
    ("fp4", "per_group"): (QUARK_MXFP4, MXFP4_GROUP),
    ("fp8_e4m3", "per_tensor"): (replace(_FP8, scale_of=ScaleOf.TENSOR), -1),
    ("fp8_e4m3", "per_channel"): (replace(_FP8, scale_of=ScaleOf.CHANNEL), -1),
}
"""Packing and group size of the floats that need no more to be known."""

REDO = f"quantize again with one of these, or {USE_VLLM}"
KV_CACHE_SPEC = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}


class QuarkFormat(CheckpointFormat):
    """`quant_method: quark`, the weights of `KNOWN`."""

    name = "quark"
    markers = frozenset({SCALE.name, ZERO_POINT.name, INPUT_SCALE})
    support = (
        Support(
            "Quark `int4` and `uint4`, `pack_method` order and reorder, also `layer_quant_config`",
            bit_widths((4,)),
            "symmetric and asymmetric",
            groups="multiples of 8",
        ),
        Support(
            'Quark `fp4` (MXFP4), weight-only, or W4A4 and W4A8 by `"activations": "16-bit"`',
            "4 bits (E2M1)",
            "floats",
            groups=str(MXFP4_GROUP),
        ),
        Support(
            'Quark `fp8_e4m3`, weight-only, or W8A8 by `"activations": "16-bit"`',
            "8 bits (E4M3)",
            "floats",
            groups="per tensor, per channel, blocks of any size",
        ),
    )
    exclusion = "exclude"
    head_setting = "exclude, which must not name lm_head"

    def check_config(self) -> None:
        export = self.config.get("export")
        self.export: dict[str, Any] = export if isinstance(export, dict) else {}
        method = self.export.get("pack_method")
        if not isinstance(method, str) or method not in ORDERS:
            raise self.refusal(
                f"export.pack_method {method!r:.80}", f"pack_method {' or '.join(ORDERS)}"
            )
        self.order = ORDERS[method]
        self._check_rotations()
        self.all = self._layer_config(GLOBAL, self.config.get(GLOBAL))
        self.by_class = self._layer_configs(BY_CLASS)
        self.by_name = self._layer_configs(BY_NAME)
        self.excluded = self.check_names("exclude")
        self.kv_cache = self._kv_cache()
        names = (*self.excluded, *self.by_name, *self.kv_cache)
        self.patterns = {name: self._matcher(name) for name in names}

    def claims(self, module: str) -> bool:
        inside = module in self.packed or self.block_of(module) in self.quantized_blocks
        return inside and bool(self._config_of(module).get("weight")) and not self.excludes(module)

    def lists(self, module: str) -> bool:
        # What lies in an excluded module may stay as it is, too
        inside = module not in self.packed
        return any(
            self.patterns[name](module) or (inside and module.startswith(f"{name}."))
            for name in self.excluded
        )

    def claims_head(self, module: str) -> bool:
        return module in self.packed and self.claims(module)

    def activations(self, module: str) -> str:
        return _words(self._config_of(module).get("input_tensors"))

    def scheme(self, module: str) -> Scheme:
        config = self._config_of(module)
        for part in NOT_FOLLOWED:
            of_cache = part == OUTPUTS and any(self.patterns[n](module) for n in self.kv_cache)
            if config.get(part) and not of_cache:
                raise PreflightError.single(
                    module, f"quantized {part} ({_dtypes(config[part])})", f"{part} null", REDO
                )
        stored = self.checkpoint.modules()[module]
        scheme = self._scheme_of(module, config["weight"])
        return replace(scheme, layouts=(*scheme.layouts, *unread(stored, (INPUT_SCALE,))))

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        # Quark quantizes keys and values as outputs of the layers that make them
        found = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        return found if self.kv_cache else None

    def _scheme_of(self, module: str, weight: Any) -> Scheme:
        """The scheme of a module whose weight the config describes so."""
        one = weight[0] if isinstance(weight, list) and len(weight) == 1 else weight
        spec: dict[str, Any] = one if isinstance(one, dict) else {}
        dtype, qscheme = kind = str(spec.get("dtype")), str(spec.get("qscheme"))
        if kind not in KNOWN:
            names = ", ".join(" ".join(each) for each in KNOWN)
            raise PreflightError.single(
                module, f"weights of {_dtypes(weight)} {qscheme:.40}", names, REDO
            )
        for key, known in KNOWN[kind].items():
            if (found := spec.get(key)) not in known:
                supported = f"{key} {' or '.join(str(each) for each in known)}"
                raise PreflightError.single(
                    module, f"{dtype} weights with {key} {found!r:.80}", supported, REDO
                )
        packing, group_size = self._packing(module, kind, spec)
        return packing.scheme(self.checkpoint.modules()[module], group_size)

    def _packing(
        self, module: str, kind: tuple[str, str], spec: dict[str, Any]
    ) -> tuple[QuarkIntPacking | Float4Packing | Float8Packing, int]:
        """Packing and group size."""
        if kind in FLOATS:
            return FLOATS[kind]
        if kind == BLOCKED:
            block = spec.get("block_size")
            if not is_block(block):
                raise PreflightError.single(module, f"block_size {block!r:.80}", BLOCKS, REDO)
            rows, columns = block
            return replace(_FP8, name=f"fp8 {rows}x{columns}", rows=rows), columns
        group_size = spec.get("group_size")
        if type(group_size) is not int or group_size <= 0 or group_size % 8:
            raise PreflightError.single(
                module, f"group_size {group_size!r:.80}", "multiples of 8", REDO
            )
        signed, symmetric = spec["dtype"] == "int4", bool(spec["symmetric"])
        return QuarkIntPacking(order=self.order, signed=signed, symmetric=symmetric), group_size

    def _config_of(self, module: str) -> dict[str, Any]:
        """What the config says of a linear; by its name, the first that matches, wins."""
        for name, config in self.by_name.items():
            if self.patterns[name](module):
                return config
        return self.by_class.get(LINEAR, self.all)

    def _layer_configs(self, key: str) -> dict[str, dict[str, Any]]:
        found = self.config.get(key) or {}
        if not isinstance(found, dict):
            raise self.refusal(f"{key} {found!r:.80}", f"{key} as a JSON object")
        return {name: self._layer_config(f"{name} in {key}", each) for name, each in found.items()}

    def _layer_config(self, where: str, found: object) -> dict[str, Any]:
        if not isinstance(found, dict):
            raise self.refusal(
                f"{found!r:.80} as {where:.80}", "a JSON object that describes weights"
            )
        return found

    def _matcher(self, name: str) -> Callable[[str], object]:
        if name.startswith(REGEX):
            return self.check_regex(name.removeprefix(REGEX)).match
        if not WILD & set(name):
            return name.__eq__
        return re.compile(translate(name)).match

    def _check_rotations(self) -> None:
        algorithms = self.config.get("algo_config") or []
        for each in algorithms if isinstance(algorithms, list) else [algorithms]:
            online = [key for key in ONLINE_ROTATIONS if isinstance(each, dict) and each.get(key)]
            if online:
                raise self.refusal(
                    f"{', '.join(online)} in algo_config (rotated activations)",
                    "rotations that are merged into the weights (r1, r2)",
                )

    def _kv_cache(self) -> list[str]:
        """Names of layers whose outputs are quantized as keys and values."""
        groups = self.check_names("kv_cache_group", self.export)
        named = {
            name: config
            for name, config in self.by_name.items()
            if any(fnmatchcase(name, group) for group in groups)
        } | self._layer_configs(KV_CACHE)
        found = {name: outputs for name, each in named.items() if (outputs := each.get(OUTPUTS))}
        for name, outputs in found.items():
            spec = outputs if isinstance(outputs, dict) else {}
            if any(spec.get(key) != known for key, known in KV_CACHE_SPEC.items()):
                raise self.refusal(
                    f"a KV cache of {_dtypes(outputs)} {spec.get('qscheme')!r:.40} ({name:.80})",
                    f"a KV cache of {' '.join(KV_CACHE_SPEC.values())}",
                )
        return list(found)


def _words(spec: Any) -> str:
    """What a description of activations says: dtypes, and whether they are dynamic; "" if empty."""
    first = spec[0] if isinstance(spec, list) and spec else spec
    if not first or not isinstance(first, dict):
        return _dtypes(spec) if spec else ""
    return f"{_dtypes(spec)}, {'dynamic' if first.get('is_dynamic') else 'static'}"


def _dtypes(spec: Any) -> str:
    """The dtype that a description of a tensor names, of several steps one over the other."""
    steps = spec if isinstance(spec, list) else [spec]
    if not all(isinstance(step, dict) for step in steps):
        return f"{spec!r:.40}"
    return " over ".join(f"{step.get('dtype')!s:.40}" for step in steps)
