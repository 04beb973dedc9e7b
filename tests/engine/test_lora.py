"""A LoRA adapter on fused layers, beside a quantized lm_head: its product is added, exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import Truth, write_checkpoint, write_json
from engines import generate, mean_error
from heads import config_with_head, quantized_head
from hf_reference import reference_logprobs
from test_reload import PROMPTS, SIZES, random_tables

pytestmark = pytest.mark.engine

RANK, ALPHA = 8, 16


def write_adapter(path: Path, truths: dict[str, Truth]) -> dict[str, torch.Tensor]:
    """A peft adapter on every quantized module; returns what it adds to each weight."""
    generator = torch.Generator().manual_seed(1)
    tensors, added = {}, {}
    for module, truth in truths.items():
        n, k = truth.codes.shape
        a = (torch.randn(RANK, k, generator=generator) / 16).bfloat16()
        b = (torch.randn(n, RANK, generator=generator) / 16).bfloat16()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        added[module] = ALPHA / RANK * b.float() @ a.float()
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    targets = sorted({module.rpartition(".")[2] for module in truths})
    config |= {"target_modules": targets, "bias": "none", "base_model_name_or_path": ""}
    write_json(path / "adapter_config.json", config)
    return added


@pytest.mark.parametrize("beside", [False, True], ids=["apart", "beside-the-model"])
def test_an_adapter_adds_its_product(tmp_path: Path, beside: bool) -> None:
    """Also from the model's own directory, where vLLM alone reads it as weights of the model."""
    model = tmp_path / "model"
    adapter = model if beside else tmp_path / "adapter"
    head, edit = quantized_head("gptq-sym", SIZES["hidden"])
    config = config_with_head("gptq-sym")
    edits = [random_tables, edit]
    truths = write_checkpoint(model, "gptq-sym", edits=edits, config=config, **SIZES)
    added = write_adapter(adapter, truths)
    truths["lm_head"] = head
    answers = generate(
        tmp_path,
        model,
        PROMPTS,
        max_tokens=16,
        adapter=adapter,
        quantization="fusedq",
        enable_lora=True,
        max_lora_rank=RANK,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="bfloat16",
    )
    alone, adapted = answers[: len(PROMPTS)], answers[len(PROMPTS) :]
    for answered, delta in ((alone, None), (adapted, added)):
        texts = [p + answer["tokens"] for p, answer in zip(PROMPTS, answered, strict=True)]
        expected = reference_logprobs(model, truths, texts, delta)
        for answer, wanted in zip(answered, expected, strict=True):
            assert mean_error(answer["logprobs"], wanted[-16:]) <= 0.03

    assert all(a["tokens"] != b["tokens"] for a, b in zip(alone, adapted, strict=True))
