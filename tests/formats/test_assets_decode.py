"""Real quantizers' checkpoints decode to what their producers' own code says, bit for bit."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.formats import format_for


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "name", [*tiny_models.CHECKPOINTS, *tiny_models.MIXED, *tiny_models.BITSANDBYTES]
)
def test_every_layer_equals_its_producers_decoding(name: str) -> None:
    path = tiny_models.asset(name)
    expected = tiny_models.reference(name)["layers"]
    fmt = format_for(read_checkpoint(path))
    assert sorted(fmt.modules()) == sorted(expected)
    tensors = load_file(path / "model.safetensors")
    for module, facts in expected.items():
        layer = fmt.layer_of(module)
        assert layer is not None
        stored = {t.name: layer.grid(t, tensors[f"{module}.{t.name}"]) for t in layer.tensors}
        weight = layer.packing.logical(stored, layer, layer.whole)
        codes, zeros = weight.codes, weight.zeros
        if weight.perm is not None:
            # References list in_features in the order of the file
            codes = codes[:, weight.perm.argsort()]
        if zeros is None and layer.spec.weight_type.bias is not None:
            # References list codes as stored, and the constant zero point of a symmetric weight
            bits = layer.packing.bits
            codes = codes - (layer.spec.weight_type.bias - 2 ** (bits - 1))
            zeros = torch.full(weight.scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        assert {
            "N": layer.n,
            "K": layer.k,
            "group_size": layer.spec.group_size,
            "codes_sha256": digest(codes),
            "zeros_sha256": None if zeros is None else digest(zeros),
            "scales_sha256": digest(weight.scales),
            "scales_dtype": str(weight.scales.dtype).removeprefix("torch."),
        } == facts, module
