"""What stored values prove of a convention that a config may name wrongly, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_fusedq.errors import WeightLoadError


@dataclass(frozen=True, slots=True)
class Finding:
    """One layer's evidence: the convention that the config named and the one its values prove.

    `found` is None where they prove none, and the layer was read as `said`. `why` is the evidence,
    `setting` the config's entry that names the convention.
    """

    said: str
    found: str | None
    why: str
    setting: str = "checkpoint_format"


def settle(findings: Mapping[str, Finding]) -> str:
    """What to tell of a checkpoint whose layers, by name, were read as found; empty: all as said.

    Raises:
        WeightLoadError: layers prove different conventions, or some prove another one than the
            config named while others were read as it says.
    """
    by_found: dict[str | None, list[str]] = {}
    for layer, finding in findings.items():
        by_found.setdefault(finding.found, []).append(layer)
    named = {found: layers for found, layers in by_found.items() if found is not None}
    surprising = {name for name in named if name != findings[named[name][0]].said}
    if not surprising:
        return ""
    if len(by_found) > 1:
        listing = "; ".join(
            f"{found or 'nothing proven'} in {len(layers)} layers ({layers[0]}: "
            f"{findings[layers[0]].why or 'too few values to tell'})"
            for found, layers in by_found.items()
        )
        setting = next(iter(findings.values())).setting
        raise WeightLoadError(
            f"found layers that were stored in different ways: {listing}; supported: one "
            f"{setting} for all; set it to {' or '.join(sorted(named))} in the config if "
            "that is what the model was quantized with, or quantize again"
        )
    (found,) = surprising
    first = findings[named[found][0]]
    return (
        f"The config says {first.said}, the values say {found} ({first.why}): "
        f"{len(named[found])} layers are read as {found}."
    )
