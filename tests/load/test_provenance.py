"""What a layer receives is what the file holds, or an error names the layer."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from loading import plans_of
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import WeightLoadError
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.load.provenance import SAMPLES, StoredTensors

MODULE = "model.layers.0.self_attn.o_proj"
HEADS = 4


def source_of(path: Path) -> StoredTensors:
    return StoredTensors(read_checkpoint(path), lambda file: path / file)


def swap_heads(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The last two of four heads change places; the rest stays where it is."""
    first, second, third, fourth = tensor.chunk(HEADS, dim)
    return torch.cat([first, second, fourth, third], dim)


def to_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of a head taken alternately from its halves, as for a rotary embedding."""
    heads = tensor.unflatten(0, (HEADS, 2, -1))
    return heads.transpose(1, 2).reshape(tensor.shape)


@pytest.mark.parametrize("build", ["gptq-asym", "awq", "ct-asym", "bnb-nf4"])
def test_every_stored_tensor_passes_as_it_is(tmp_path: Path, build: str) -> None:
    write_checkpoint(tmp_path, build, hidden=64, intermediate=96)
    source = source_of(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        source.check(name, tensor)
        source.check(name, tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)


@pytest.mark.parametrize(
    ("build", "suffix", "rearrange"),
    [
        ("gptq-sym", "qweight", lambda t: swap_heads(t, 1)),
        ("gptq-sym", "scales", lambda t: swap_heads(t, 1)),
        ("gptq-sym", "qweight", lambda t: t.flip(0)),
        ("awq", "qweight", lambda t: swap_heads(t, 1)),
        ("awq", "qzeros", lambda t: swap_heads(t, 1)),
        ("ct-sym", "weight_packed", to_pairs),
        ("ct-sym", "weight_scale", to_pairs),
        ("ct-asym", "weight_zero_point", lambda t: swap_heads(t, 0)),
        ("bnb-nf4", "weight", lambda t: t.flip(0)),
        ("gptq-sym", "scales", lambda t: t * 2),
    ],
)
def test_a_rearranged_tensor_is_refused(
    tmp_path: Path,
    build: str,
    suffix: str,
    rearrange: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    write_checkpoint(tmp_path, build, hidden=256, intermediate=256)
    name = f"{MODULE}.{suffix}"
    stored = load_file(tmp_path / "model.safetensors")[name]
    message = rf"{name}: found a tensor that differs from the file at \d+ of {SAMPLES} places"
    with pytest.raises(WeightLoadError, match=message) as error:
        source_of(tmp_path).check(name, rearrange(stored))
    assert "vLLM's code for this model rearranges the tensor while loading" in str(error.value)
    assert "docs/models.md" in str(error.value)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "bnb-nf4", hidden=64, intermediate=96)
    name = f"{MODULE}.weight"
    stored = load_file(tmp_path / "model.safetensors")[name]
    source = source_of(tmp_path)
    source.check(name, stored.t())
    with pytest.raises(WeightLoadError, match=rf"{name}: found a tensor \[1024, 1\], where"):
        source.check(name, stored[::2])


def test_without_the_file_shapes_alone_are_compared_and_one_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, "bnb-nf4", hidden=64, intermediate=96)
    name = f"{MODULE}.weight"
    stored = load_file(tmp_path / "model.safetensors")[name]
    source = StoredTensors(read_checkpoint(tmp_path), lambda file: None)
    with caplog.at_level(logging.WARNING, "vllm.fusedq"):
        source.check(name, stored.flip(0))
        source.check(name, stored)
    assert len(caplog.records) == 1
    assert "model.safetensors is not on this machine" in caplog.text
    with pytest.raises(WeightLoadError, match="rearranges the tensor while loading"):
        source.check(name, stored[::2])


def test_a_layer_compares_its_first_load_and_takes_new_values_afterwards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym", hidden=64, intermediate=96)
    tensors = load_file(tmp_path / "model.safetensors")
    plan = next(p for p in plans_of(read_checkpoint(tmp_path), "cpu") if "o_proj" in p.prefix)
    names = [stored.name for stored in plan.formats[0].tensors]
    loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"), source_of(tmp_path))
    with pytest.raises(WeightLoadError, match=rf"{MODULE}\.scales: found a tensor that differs"):
        loader.add("scales", tensors[f"{MODULE}.scales"].flip(1))
    for name in names:
        loader.add(name, tensors[f"{MODULE}.{name}"])
    loader.check_complete()
    for name in names:
        loader.add(name, tensors[f"model.layers.0.self_attn.q_proj.{name}"])
    loader.check_complete()


def test_released_files_are_mapped_anew(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym", hidden=64, intermediate=96)
    name = f"{MODULE}.qweight"
    stored = load_file(tmp_path / "model.safetensors")[name].clone()
    source = source_of(tmp_path)
    source.check(name, stored)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    file.unlink()
    source.check(name, stored)
    source.release()
    file.write_bytes(bytes(size))
    with pytest.raises(WeightLoadError, match="or the file was replaced meanwhile"):
        source.check(name, stored)
