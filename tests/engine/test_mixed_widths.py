"""Several schemes and numbers of bits in one model, against the libraries that made it."""

import math
from pathlib import Path

import pytest

from engines import generate, mean_error
from tiny_models import MIXED, asset, reference

pytestmark = pytest.mark.engine

TP_SIZES = {"tiny-llama-gptq-mixed": 2, "tiny-llama-ct-mixed": 1}


@pytest.mark.parametrize("name", MIXED)
def test_every_width_answers_as_its_producing_library(tmp_path: Path, name: str) -> None:
    tp_size = TP_SIZES[name]
    prompts = reference(name)["prompts"]
    answers = generate(
        tmp_path,
        asset(name),
        [prompt["token_ids"] for prompt in prompts],
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tp_size == 2 else None,
        quantization="fusedq",
        tensor_parallel_size=tp_size,
        enforce_eager=True,
        dtype="bfloat16",
    )
    found = [answer["prompt_logprobs"] for answer in answers]
    expected = [prompt["prompt_logprobs"] for prompt in prompts]
    errors = [mean_error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors) <= 0.03
    ours, theirs = (sum(sum(each[1:]) for each in side) for side in (found, expected))
    tokens = sum(len(each) - 1 for each in expected)
    assert math.exp(-ours / tokens) == pytest.approx(math.exp(-theirs / tokens), rel=0.01)
