"""Layers that real quantizers wrote into small files are worth what their own code says."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tiny_models
from fusedq_kernels.encodings import Floats
from layers import DTYPE_NAMES, cut
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.formats import LayerFormat, format_for

# Schemes of each file
FILES = {
    "llmcompressor-layers": 21,
    "gptqmodel-layers": 13,
    "old-compressed-tensors-layers": 7,
    "autoround-layers": 5,
    "autoround-gptq-layers": 8,
    "autoround-awq-layers": 4,
    "modelopt-layers": 4,
    "quark-layers": 6,
    "llmcompressor-float-layers": 4,
}


# NVFP4's, by compressed-tensors and by ModelOpt
SCALES_OF_ALL = ("weight_global_scale", "weight_scale_2")


def layers_of(path: Path) -> Iterator[tuple[LayerFormat, dict[str, torch.Tensor], str]]:
    """Each layer by the config in the file's metadata, its tensors, the digest of its weight."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    infos = {
        name: TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path.name)
        for name, tensor in stored.items()
    }
    config = json.loads(metadata["quantization_config"])
    fmt = format_for(Checkpoint(str(path), {}, config, "quantization_config", infos, {}))
    digests = json.loads(metadata["values_sha256"])
    assert sorted(fmt.modules()) == sorted(digests)
    for module, expected in digests.items():
        layer = fmt.layer_of(module)
        assert layer is not None
        yield layer, {t.name: stored[f"{module}.{t.name}"] for t in layer.tensors}, expected


@pytest.mark.parametrize("name", FILES)
def test_every_layer_is_worth_what_its_tool_says(name: str) -> None:
    descriptions = set()
    for layer, tensors, expected in layers_of(tiny_models.ASSETS / f"{name}.safetensors"):
        weight = layer.packing.logical(cut(layer, tensors, layer.whole), layer, layer.whole)
        groups = torch.arange(layer.k) // layer.spec.group_size
        scales = weight.scales.float()
        if weight.row_scales is not None:
            (scale,) = (tensors[name] for name in SCALES_OF_ALL if name in tensors)
            divides = SCALES_OF_ALL[0] in tensors
            rows = scale.reciprocal() if divides else scale
            assert torch.equal(weight.row_scales, rows.expand(layer.n))
            # What divides is left out of the digest
            scales = scales if divides else scales * weight.row_scales[:, None]
        if isinstance(layer.spec.weight_type.encoding, Floats):
            codes = torch.tensor(layer.spec.weight_type.encoding.values)[weight.codes.long()]
        else:
            zeros = layer.spec.weight_type.bias if weight.zeros is None else weight.zeros.float()
            codes = weight.codes.float() - (zeros if weight.zeros is None else zeros[:, groups])
        values = codes * scales[:, groups]
        if weight.perm is not None:
            values = values[:, weight.perm.argsort()]
        # AutoRound's scales may be negative: digests are of +0, whatever made them
        found = hashlib.sha256((values + 0.0).contiguous().numpy().tobytes()).hexdigest()
        assert found == expected, layer.description
        descriptions.add(layer.description)
    assert len(descriptions) == FILES[name]
