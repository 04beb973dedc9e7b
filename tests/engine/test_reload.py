"""vLLM's `reload_weights` puts other weights into two running ranks, in the same memory.

The lm_head is quantized too: its padded vocabulary is cut between the ranks.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import Tensors, Truth, drop, write_checkpoint
from engines import ask, mean_error
from heads import config_with_head, quantized_head
from hf_reference import reference_logprobs

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i + 3 * j) % 30 for i in range(48)] for j in range(4)]
SIZES = {"hidden": 256, "intermediate": 448, "layers": 2}
DOWN = "model.layers.1.mlp.down_proj"


def random_tables(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = torch.randn(tensors[name].shape, generator=generator) / 16
        tensors[name] = table.to(tensors[name].dtype)


def exchanged(name: str) -> str:
    """The name of a tensor after layers 0 and 1 have changed places."""
    return name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")


def exchange_layers(path: Path, to: Path, truths: dict[str, Truth]) -> dict[str, Truth]:
    to.mkdir()
    (to / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    tensors = {exchanged(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return {exchanged(name): truth for name, truth in truths.items()}


def test_reloading_fills_the_same_memory_with_other_weights(tmp_path: Path) -> None:
    first, second, lacking = (tmp_path / name for name in ("first", "second", "lacking"))
    head, edit = quantized_head("ct-asym", SIZES["hidden"])
    options = {**SIZES, "config": config_with_head("ct-asym")}
    truths = write_checkpoint(first, "ct-asym", edits=[random_tables, edit], **options)
    truths["lm_head"] = head
    second_truths = exchange_layers(first, second, truths)
    lose = drop(f"{DOWN}.weight_zero_point")
    write_checkpoint(lacking, "ct-asym", edits=[random_tables, edit, lose], **options)
    request = {
        "engine": {
            "model": str(first),
            "quantization": "fusedq",
            "tensor_parallel_size": 2,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 128,
            "dtype": "float16",
        },
        "prompts": PROMPTS,
        "reloads": [str(each) for each in (second, first, lacking)],
    }
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    loaded, reloaded, again, refused = ask("reload.py", tmp_path, request, env)
    assert [len(pointers) for pointers in loaded["pointers"]] == [9 * 2, 9 * 2]
    assert reloaded["pointers"] == again["pointers"] == loaded["pointers"]
    assert again["prompt_logprobs"] == loaded["prompt_logprobs"]
    for answer, path, meaning in ((loaded, first, truths), (reloaded, second, second_truths)):
        expected = reference_logprobs(path, meaning, PROMPTS)
        for found, wanted in zip(answer["prompt_logprobs"], expected, strict=True):
            assert mean_error(found, wanted) <= 0.03
    for found, other in zip(loaded["prompt_logprobs"], reloaded["prompt_logprobs"], strict=True):
        assert mean_error(found, other) > 0.1
    assert f"1 tensors were never loaded ({DOWN}.weight_zero_point)" in refused["error"]
