"""Real quantizers' checkpoints decode to what their producers' own code says, bit for bit."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from vllm_fusedq.checkpoint import read_checkpoint
from vllm_fusedq.formats import decode, format_for


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", tiny_models.CHECKPOINTS)
def test_every_layer_equals_its_producers_decoding(name: str) -> None:
    path = tiny_models.asset(name)
    expected = tiny_models.reference(name)["layers"]
    fmt = format_for(read_checkpoint(path))
    assert sorted(fmt.modules()) == sorted(expected)
    tensors = load_file(path / "model.safetensors")
    for module, facts in expected.items():
        layer = fmt.spec_for(module)
        assert layer is not None
        stored = {t.name: tensors[f"{module}.{t.name}"] for t in layer.tensors}
        weight = decode(stored, layer, layer.whole)
        zeros = weight.zeros
        if zeros is None:
            # References list the constant zero point of a symmetric weight
            zeros = torch.full(weight.scales.shape, layer.spec.weight_type.bias, dtype=torch.uint8)
        assert {
            "N": layer.n,
            "K": layer.k,
            "group_size": layer.spec.group_size,
            "codes_sha256": digest(weight.codes),
            "zeros_sha256": digest(zeros),
            "scales_sha256": digest(weight.scales),
            "scales_dtype": str(weight.scales.dtype).removeprefix("torch."),
        } == facts, module
