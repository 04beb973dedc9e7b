"""fp8 KV caches beside fused layers: the file's scales on one rank and on two, and their effect."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_json
from engines import ask, generate, mean_error
from kv_scales import SCHEME, kv_scales
from tiny_models import asset, reference

pytestmark = pytest.mark.engine

CT, GPTQ = "tiny-llama-ct-sym-g128", "tiny-llama-gptq-g128"
# The largest keys and values of the prompts' tokens over 448: 12.34, 12.83 and 21.99, 15.94
CALIBRATED = ((0.0275438321, 0.0286485510), (0.0490852850, 0.0355840538))
# Nearly everything is beyond 448 times these
SATURATING = ((1.1e-4, 1.3e-4), (1.7e-4, 1.9e-4))
FUSED = {"quantization": "fusedq", "enforce_eager": True, "skip_tokenizer_init": True}
FUSED |= {"dtype": "bfloat16", "max_model_len": 128}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def prompts_of(name: str) -> list[list[int]]:
    return [prompt["token_ids"] for prompt in reference(name)["prompts"]]


def write_model(
    path: Path, name: str, scales: Any, spelling: str, scheme: dict[str, Any] | None = None
) -> Path:
    shutil.copytree(asset(name), path)
    tensors = load_file(path / "model.safetensors")
    kv_scales(*scales, spelling=spelling)(tensors)
    if scheme:
        for block in range(len(scales)):
            for part in "kv":
                zero = torch.zeros(1, dtype=torch.int8)
                tensors[f"model.layers.{block}.self_attn.{part}_zero_point"] = zero
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    if scheme:
        config["quantization_config"]["kv_cache_scheme"] = scheme
    write_json(path / "config.json", config)
    return path


def run(folder: Path, model: Path, name: str, tp_size: int = 1, **engine: Any) -> tuple[Any, Any]:
    """What was answered, and each rank's KV caches."""
    dump = folder / f"dump{tp_size}"
    dump.mkdir(exist_ok=True)
    answers = generate(
        folder,
        model,
        prompts_of(name),
        max_tokens=8,
        dump=dump,
        env=TWO_RANKS if tp_size == 2 else None,
        tensor_parallel_size=tp_size,
        **FUSED,
        **engine,
    )
    caches = [torch.load(dump / f"kv{rank}.pt") for rank in range(tp_size)]
    for rank in range(tp_size):
        assert len(torch.load(dump / f"rank{rank}.pt")) == 8, "linears of two blocks"
    return answers, caches


def error(answers: Any, expected: Any) -> float:
    """Nats per token, in the mean."""
    pairs = list(zip(answers, expected, strict=True))
    errors = [mean_error(a["prompt_logprobs"], b["prompt_logprobs"]) for a, b in pairs]
    return sum(errors) / len(errors)


def assert_scales(caches: Any, dtype: str, scales: Any) -> None:
    for rank in caches:
        assert list(rank) == [f"model.layers.{block}.self_attn.attn" for block in range(2)]
        for cache, pair in zip(rank.values(), scales, strict=True):
            assert cache["dtype"] == dtype
            assert torch.equal(cache["scales"], torch.tensor(pair, dtype=torch.float32))
            assert cache["floats"] == tuple(cache["scales"].tolist())


def test_a_scheme_is_served_in_fp8_on_one_rank_and_on_two(tmp_path: Path) -> None:
    plain, caches = run(tmp_path, asset(CT), CT)
    assert_scales(caches, "auto", [(1.0, 1.0)] * 2)
    model = write_model(tmp_path / "model", CT, CALIBRATED, "llm-compressor", SCHEME)
    one, caches = run(tmp_path, model, CT)
    assert_scales(caches, "fp8", CALIBRATED)
    assert 0.005 < error(one, plain) <= 0.1
    two, caches = run(tmp_path, model, CT, tp_size=2)
    assert_scales(caches, "fp8", CALIBRATED)
    assert error(two, plain) <= 0.1
    wide, caches = run(tmp_path, model, CT, kv_cache_dtype="bfloat16")
    assert_scales(caches, "bfloat16", [(1.0, 1.0)] * 2)
    assert wide == plain


@pytest.mark.parametrize("spelling", ["modelopt", "fp8"])
def test_scales_alone_are_applied_where_fp8_is_asked_for(tmp_path: Path, spelling: str) -> None:
    plain, _ = run(tmp_path, asset(GPTQ), GPTQ)
    model = write_model(tmp_path / "model", GPTQ, SATURATING, spelling)
    auto, caches = run(tmp_path, model, GPTQ)
    assert_scales(caches, "auto", [(1.0, 1.0)] * 2)
    assert auto == plain
    saturated, caches = run(tmp_path, model, GPTQ, kv_cache_dtype="fp8")
    assert_scales(caches, "fp8", SATURATING)
    assert error(saturated, plain) > 1


def test_a_cache_of_e5m2_without_scales(tmp_path: Path) -> None:
    plain, _ = run(tmp_path, asset(CT), CT)
    narrow, caches = run(tmp_path, asset(CT), CT, kv_cache_dtype="fp8_e5m2")
    assert_scales(caches, "fp8_e5m2", [(1.0, 1.0)] * 2)
    assert 0.005 < error(narrow, plain) <= 0.15


def test_a_reload_brings_its_own_scales(tmp_path: Path) -> None:
    calibrated = write_model(tmp_path / "good", CT, CALIBRATED, "llm-compressor", SCHEME)
    saturating = write_model(tmp_path / "bad", CT, SATURATING, "llm-compressor", SCHEME)
    request = {
        "engine": {**FUSED, "model": str(calibrated)},
        "prompts": prompts_of(CT),
        "reloads": [str(saturating), str(calibrated)],
    }
    first, second, third = ask("reload.py", tmp_path, request, None)
    assert third == first
    assert second["prompt_logprobs"] != first["prompt_logprobs"]
