"""Quantized input embeddings in vLLM's engine, with an lm_head of their own and tied to it."""

from pathlib import Path

import pytest
import torch

from checkpoints import replace
from embeddings import write_with_embedding
from engines import generate, mean_error
from hf_reference import reference_logprobs
from tiny_models import TIED, asset, reference

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i + 3 * j) % 30 for i in range(48)] for j in range(3)]


def test_a_tied_embedding_of_the_tool_that_writes_them_on_two_ranks(tmp_path: Path) -> None:
    """One packed weight looks tokens up and makes logits, half of the vocabulary on each rank."""
    (name,) = TIED
    prompts = reference(name)["prompts"]
    answers = generate(
        tmp_path,
        asset(name),
        [prompt["token_ids"] for prompt in prompts],
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        quantization="fusedq",
        tensor_parallel_size=2,
        enforce_eager=True,
        dtype="bfloat16",
    )
    found = [answer["prompt_logprobs"] for answer in answers]
    expected = [prompt["prompt_logprobs"] for prompt in prompts]
    assert max(mean_error(*pair) for pair in zip(found, expected, strict=True)) <= 0.03


def test_an_embedding_of_eight_bits_beside_an_lm_head_compiled(tmp_path: Path) -> None:
    """Llama's model in vLLM does not tell its embedding's name; torch.compile is on."""
    generator = torch.Generator().manual_seed(0)
    head = replace(
        "lm_head.weight", lambda t: (torch.randn(t.shape, generator=generator) / 16).to(t.dtype)
    )
    path = tmp_path / "model"
    sizes = {"hidden": 256, "intermediate": 384, "layers": 1}
    truths = write_with_embedding(path, "ct-8bit-asym", tied=False, edits=(head,), **sizes)
    answers = generate(
        tmp_path,
        path,
        PROMPTS,
        quantization="fusedq",
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="float16",
    )
    expected = reference_logprobs(path, truths, PROMPTS)
    found = [answer["prompt_logprobs"] for answer in answers]
    assert max(mean_error(*pair) for pair in zip(found, expected, strict=True)) <= 0.01
