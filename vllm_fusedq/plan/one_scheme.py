"""The parts of a fused layer have one scheme, or the layer is refused."""

from collections.abc import Mapping, Sequence

from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats.layer import LayerFormat
from vllm_fusedq.plan.shards import LayerShard


def of_one_scheme(
    shard: LayerShard, formats: Mapping[str, LayerFormat | None]
) -> tuple[LayerFormat, ...]:
    """All parts' formats: a fused layer never mixes schemes silently."""
    found = [(part.module, formats.get(part.module)) for part in shard.parts]
    specs = {(layer.spec, layer.ordered) if layer else None for _, layer in found}
    if len(specs) > 1 or None in specs:
        dtypes = {layer.spec.scale_dtype for _, layer in found if layer is not None}
        listing = ", ".join(
            f"{module.rpartition('.')[2]} {_told(layer, len(dtypes) > 1)}"
            for module, layer in found
        )
        raise PreflightError.single(
            layer=shard.name,
            found=f"parts with different schemes in one fused layer ({listing})",
            supported="one scheme for all parts that vLLM fuses into a layer",
            fix="quantize the model again with these modules alike, or with all of them "
            f"excluded{_by_exclusion(found)}",
        )
    layers = tuple(layer for _, layer in found if layer is not None)
    if len({layer.k for layer in layers}) > 1:
        sizes = ", ".join(
            f"{layer.module.rpartition('.')[2]} [{layer.n}, {layer.k}]" for layer in layers
        )
        raise PreflightError.single(
            layer=shard.name,
            found=f"parts with different in_features in one fused layer ({sizes})",
            supported="parts [out_features, in_features] of one activation",
            fix="download the checkpoint again or quantize the model again",
        )
    return layers


def _told(layer: LayerFormat | None, with_scales: bool) -> str:
    if layer is None:
        return "unquantized"
    scales = f", scales in {layer.spec.scale_dtype.value}" if with_scales else ""
    return f"{layer.description}{scales}"


def _by_exclusion(found: Sequence[tuple[str, LayerFormat | None]]) -> str:
    names = {layer.exclusion for _, layer in found if layer is not None}
    return f" by {names.pop()}" if len(names) == 1 else ""
