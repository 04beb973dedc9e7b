"""compressed-tensors checkpoints in the pack-quantized format (llm-compressor), 4-bit integers.

weight_packed int32 `[N, K / 8]` packs in_features, weight_zero_point int32 `[N / 8, G]` (asymmetric
only) out_features, both in order from the lowest nibble and both stored plus 8; weight_scale
`[N, G]`; weight_shape holds N and K; with actorder group, weight_g_idx int32 `[K]` is each
in_feature's group, or -1 throughout. Source: `pack_to_int32` and `dequantize` of the
compressed_tensors package.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fusedq_kernels.types import LogicalWeight, WeightType
from vllm_fusedq.errors import PreflightError, Problem, WeightLoadError
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
    TensorLayout("weight_packed", (Dim("n"), Dim("k", 8)), (torch.int32,)),
    TensorLayout("weight_scale", (Dim("n"), Dim("g")), SCALE_DTYPES),
    TensorLayout("weight_shape", (Dim(None, size=2),), (torch.int64, torch.int32)),
)
G_IDX = TensorLayout("weight_g_idx", (Dim("k"),), (torch.int32, torch.int64))
ZERO_POINT = TensorLayout("weight_zero_point", (Dim("n", 8), Dim("g")), (torch.int32,))

FORMAT = "pack-quantized"
LINEAR_CLASS = "Linear"
# Both only change how the quantizer calibrates, not what it stores
HARMLESS_ORDERS = (None, False, "static", "weight")
STORED_ORDERS = ("group", "dynamic")
REFUSED_SECTIONS = {
    "kv_cache_scheme": "a quantized KV cache (kv_cache_scheme)",
    "sparsity_config": "sparse weights (sparsity_config)",
    "transform_config": "transformed weights (transform_config)",
}


class CompressedTensorsFormat(CheckpointFormat):
    """`quant_method: compressed-tensors`, format pack-quantized, weights only."""

    name = "compressed-tensors"
    config_sources = ("compression_config",)
    markers = frozenset({"weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx"})
    exclusion = "ignore"

    def check_config(self) -> None:
        for key, found in REFUSED_SECTIONS.items():
            section = self.config.get(key)
            if section and section != {"format": "dense"}:
                raise self.refusal(found, "quantized weights and nothing else")
        self.ignored = self.check_names("ignore")
        groups = self.config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.refusal(f"config_groups {groups!r:.80}", "at least one group of modules")
        self.groups = [self._read_group(name, group) for name, group in groups.items()]
        for target in (*self.ignored, *(t for group in self.groups for t in group.targets)):
            if target.startswith("re:"):
                self.check_regex(target[3:])

    def claims(self, module: str) -> bool:
        return not self._matches(module, self.ignored) and self._group_of(module) is not None

    def scheme(self, module: str) -> Scheme:
        group = self._group_of(module)
        assert group is not None
        stored = self.checkpoint.modules()[module]
        if "weight_g_idx" in stored and not group.ordered:
            problem = Problem(
                module,
                "weight_g_idx (activation reordering) although the config says nothing of it",
                "weight_g_idx with actorder group",
                "set actorder to group in the config if this model was quantized with it",
            )
            raise PreflightError([problem])
        layouts = LAYOUTS if group.symmetric else (*LAYOUTS, ZERO_POINT)
        if group.ordered:
            shape = stored["weight_packed"].shape if "weight_packed" in stored else ()
            k = NIBBLES * shape[-1] if shape else 0
            layouts = (*with_all_groups(layouts, -(-k // group.group_size)), G_IDX)
        return Scheme(
            WeightType.UINT4B8 if group.symmetric else WeightType.UINT4,
            group.group_size,
            layouts,
            scales="weight_scale",
            ordered=group.ordered,
        )

    @staticmethod
    def decode(
        tensors: Mapping[str, torch.Tensor], layer: LayerFormat, region: Region
    ) -> LogicalWeight:
        check_slices(tensors, layer, region, "weight_scale")
        shape = tensors["weight_shape"].tolist()
        if shape != [layer.n, layer.k]:
            raise WeightLoadError(
                f"{layer.module}.weight_shape: found {shape}, expected {[layer.n, layer.k]} after "
                "the shape of weight_packed; supported are in_features that are a multiple of 8: "
                "quantize the model again"
            )
        zeros = None
        if layer.spec.has_zero_points:
            zeros = unpack_rows(tensors["weight_zero_point"])
            zeros = take(zeros, 0, region.n_start, region.n)
        codes = take(unpack_columns(tensors["weight_packed"]), 1, region.k_start, region.k)
        scales = tensors["weight_scale"].contiguous()
        if layer.ordered:
            g_idx = _explicit_order(tensors["weight_g_idx"], layer, region)
            return sort_rows(codes, scales, zeros, g_idx, G_IDX.name, layer, region)
        phase = region.k_start % layer.spec.group_size
        return LogicalWeight(codes, scales, zeros, layer.spec, phase)

    def _read_group(self, name: str, group: Any) -> "_Group":
        """One of config_groups."""
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise self.refusal(f"{name} without a weights section", "groups that describe weights")
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                raise self.refusal(
                    f"quantized activations ({name}.{key})", "quantized weights only"
                )
        file_format = group.get("format") or self.config.get("format")
        if file_format != FORMAT:
            raise self.refusal(f"format {file_format!r} of {name}", f"format {FORMAT}")
        weights = group["weights"]
        if weights.get("num_bits") != 4 or weights.get("type", "int") != "int":
            found = f"{weights.get('num_bits')!r}-bit {weights.get('type')} weights in {name}"
            raise self.refusal(found, "4-bit int weights")
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
        return _Group(self.check_names("targets", group), symmetric, group_size, ordered)

    def _group_size(self, name: str, weights: dict[str, Any]) -> int:
        strategy, group_size = weights.get("strategy"), weights.get("group_size")
        if strategy == "group" or (strategy is None and group_size not in (None, -1)):
            return self.check_group_size(group_size)
        if strategy == "channel" or (strategy is None and group_size == -1):
            return -1
        raise self.refusal(f"strategy {strategy!r} in {name}", "strategy group or channel")

    def _group_of(self, module: str) -> "_Group | None":
        """The group that targets a module: a name or regex wins over the class of all linears."""
        for group in self.groups:
            if self._matches(module, (t for t in group.targets if t != LINEAR_CLASS)):
                return group
        return next((group for group in self.groups if LINEAR_CLASS in group.targets), None)

    def _matches(self, module: str, targets: Iterable[str]) -> bool:
        for target in targets:
            if target in (module, LINEAR_CLASS):
                return True
            if target.startswith("re:") and self.check_regex(target[3:]).match(module):
                return True
        return False


class _Group(NamedTuple):
    """`ordered`: weight_g_idx may say anything (activation reordering)."""

    targets: list[str]
    symmetric: bool
    group_size: int
    ordered: bool


def _explicit_order(g_idx: torch.Tensor, layer: LayerFormat, region: Region) -> torch.Tensor:
    """weight_g_idx, where -1 throughout means the order of in_features."""
    if bool((g_idx != -1).any()):
        return g_idx
    rows = torch.arange(region.k_start, region.k_stop, device=g_idx.device)
    return rows // layer.spec.group_size
