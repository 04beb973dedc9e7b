"""Batches without a server, other kernels inside the engine, models that are none of ours."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engines import SMALL_CACHE, generate, mean_error
from local_server import VLLM, environment
from tiny_models import UNQUANTIZED, asset, reference

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]


def test_run_batch(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [*VLLM, "run-batch", "-i", str(ROOT / "examples" / "batch.jsonl"), "-o", str(results)]
    command += ["--model", str(asset("tiny-llama-gptq-g128")), "--served-model-name", "tiny"]
    command += ["--quantization", "fusedq", "--max-model-len", "256", "--enforce-eager"]
    command += SMALL_CACHE
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in results.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["chat-1", "chat-2", "chat-3"]
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["body"]["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("name", ["tiny-llama-awq-g128", "tiny-llama-ct-sym-g128"])
def test_the_triton_kernel_runs_inside_the_engine(tmp_path: Path, name: str) -> None:
    """The very kernel that a GPU compiles, in Triton's interpreter, in vLLM's worker process."""
    prompt = reference(name)["prompts"][0]
    answer = generate(
        tmp_path,
        asset(name),
        [prompt["token_ids"][:24]],
        env={"TRITON_INTERPRET": "1"},
        quantization="fusedq",
        additional_config={"fusedq": {"kernel": "triton-gemm"}},
        dtype="float16",
        enforce_eager=True,
        max_num_batched_tokens=64,
        max_num_seqs=1,
        max_model_len=64,
    )[0]
    assert mean_error(answer["prompt_logprobs"], prompt["prompt_logprobs"][:24]) <= 0.03


def without_fusedq(folder: Path, model: str, plugins: dict[str, str]) -> list[dict[str, Any]]:
    prompts = [prompt["token_ids"] for prompt in reference(model)["prompts"]][:3]
    return generate(
        folder,
        asset(model),
        prompts,
        max_tokens=8,
        env=plugins,
        enforce_eager=True,
        # Requests that share a step by chance would be rounded otherwise than those that do not.
        max_num_seqs=1,
    )


@pytest.mark.parametrize("model", [UNQUANTIZED, "tiny-llama-awq-g128"])
def test_without_the_flag_nothing_changes(tmp_path: Path, model: str) -> None:
    """An unquantized and a stock AWQ model answer alike with the plugin loaded and kept out."""
    loaded = without_fusedq(tmp_path, model, {})
    kept_out = without_fusedq(tmp_path, model, {"VLLM_PLUGINS": "none"})
    assert loaded == kept_out


def test_the_striped_kernel_serves(tmp_path: Path) -> None:
    name = "tiny-llama-ct-asym-g32"
    prompt = reference(name)["prompts"][0]
    answer = generate(
        tmp_path,
        asset(name),
        [prompt["token_ids"]],
        quantization="fusedq",
        additional_config={"fusedq": {"kernel": "cpu-striped"}},
        enforce_eager=True,
    )[0]
    assert mean_error(answer["prompt_logprobs"], prompt["prompt_logprobs"]) <= 0.03
