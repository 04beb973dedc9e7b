"""Speculative decoding: the layers that draft run fused, are reported, and hold their weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import generate
from mtp import write_mimo
from tiny_models import asset, reference

pytestmark = pytest.mark.engine

DRAFT = "tiny-llama-awq-g128"
LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def draft(
    folder: Path, model: Path, prompts: list[list[int]], speculative: dict[str, Any], **engine: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers of 16 tokens and what the draft model's fused layers hold."""
    answers = generate(
        folder,
        model,
        prompts,
        max_tokens=16,
        dump=folder,
        quantization="fusedq",
        enforce_eager=True,
        speculative_config=speculative,
        additional_config={"fusedq": {"report": str(folder / "plan.json")}},
        **engine,
    )
    return answers, torch.load(folder / "draft0.pt")


def kinds(report: Path) -> dict[str, tuple[int, str, str]]:
    """How many layers of each kind there are, their format and their kernel."""
    rows = json.loads(report.read_text())["layers"]
    return {
        row["layers"].partition(" ")[0]: (row["count"], row["description"], row["kernel"])
        for row in rows
    }


def test_multi_token_prediction(tmp_path: Path) -> None:
    model = tmp_path / "model"
    truths = write_mimo(model, quantized=True)
    _, weights = draft(
        tmp_path,
        model,
        [[(7 * i + 3 * j) % 30 for i in range(24)] for j in range(2)],
        {"method": "mtp", "num_speculative_tokens": 1},
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="float16",
    )
    kind = (3, "gptq 4-bit g64, symmetric", "cpu-fused")
    # vLLM numbers the extra block as a third one
    expected = {f"model.layers.0-2.{name}": kind for name in LAYERS}
    assert kinds(tmp_path / "plan.json") == expected
    found = {}
    for held in weights.values():
        offset = 0
        for module, n_start, n_stop, *_ in held["parts"]:
            found[module] = held["codes"][offset : offset + n_stop - n_start]
            offset += n_stop - n_start
    assert found.keys() == truths.keys()
    assert all(torch.equal(found[m], torch.from_numpy(t.codes)) for m, t in truths.items())


def test_a_draft_model_of_another_format(tmp_path: Path) -> None:
    name = "tiny-llama-gptq-g128"
    prompts = reference(name)["prompts"][:4]
    speculative = {"method": "draft_model", "model": str(asset(DRAFT)), "quantization": "fusedq"}
    answers, weights = draft(
        tmp_path,
        asset(name),
        [prompt["token_ids"] for prompt in prompts],
        speculative | {"num_speculative_tokens": 2},
        dtype="bfloat16",
    )
    for answer, prompt in zip(answers, prompts, strict=True):
        # As far as rounding cannot change a token
        margins = prompt["greedy_margins"]
        sure = next((i for i, margin in enumerate(margins) if margin < 0.1), len(margins))
        assert answer["tokens"][:sure] == prompt["greedy_token_ids"][:sure]
    assert len(weights) == 8
    kind = (2, "gptq 4-bit g128, symmetric", "cpu-fused")
    expected = {f"model.layers.0-1.{name}": kind for name in LAYERS}
    assert kinds(tmp_path / "plan.json") == expected
    kind = (2, "awq 4-bit g128, zero points", "cpu-fused")
    expected = {f"draft_model.model.layers.0-1.{name}": kind for name in LAYERS}
    assert kinds(tmp_path / "plan.draft.json") == expected
