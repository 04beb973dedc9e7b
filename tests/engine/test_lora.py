"""LoRA adapters on fused layers: the product of each is added, against merged weights."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import Truth, write_checkpoint, write_json
from engines import generate, mean_error
from heads import config_with_head, quantized_head
from hf_reference import reference_logprobs
from local_server import compile_arguments
from test_reload import PROMPTS, SIZES, random_tables
from test_tensor_parallel import TWO_RANKS

pytestmark = pytest.mark.engine

RANK, ALPHA = 8, 16
TOKENS = 16
COMPILED = {"enforce_eager": compile_arguments() != []}
TP2 = {"tensor_parallel_size": 2}
# Name -> (how the model is quantized, options of the engine). In every run of the tests:
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {"nf4": ("bnb-nf4", {})}
# Only with --all-models:
MORE_ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "nested nf4, compiled": ("bnb-nf4-nested", COMPILED),
    "nf4, two ranks": ("bnb-nf4", TP2),
    "nf4, two ranks, compiled": ("bnb-nf4", TP2 | COMPILED),
    "nf4, two ranks, adapters cut too": ("bnb-nf4", TP2 | {"fully_sharded_loras": True}),
    "awq, two ranks, compiled": ("awq", TP2 | COMPILED),
    "act-order, two ranks": ("gptq-asym-order", TP2),
}


def write_adapter(
    path: Path, truths: Mapping[str, Truth], rank: int = RANK, seed: int = 1
) -> dict[str, torch.Tensor]:
    """A peft adapter on these quantized modules; returns what it adds to each weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    for module, truth in truths.items():
        n, k = truth.codes.shape
        a = (torch.randn(rank, k, generator=generator) / 16).bfloat16()
        b = (torch.randn(n, rank, generator=generator) / 16).bfloat16()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        added[module] = ALPHA / rank * b.float() @ a.float()
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": ALPHA}
    targets = sorted({module.rpartition(".")[2] for module in truths})
    config |= {"target_modules": targets, "bias": "none", "base_model_name_or_path": ""}
    write_json(path / "adapter_config.json", config)
    return added


def compare(
    folder: Path,
    model: Path,
    truths: Mapping[str, Truth],
    adapters: Mapping[Path, dict[str, torch.Tensor]],
    **engine: Any,
) -> None:
    """The model alone and each adapter, in one batch, against transformers with merged weights."""
    answers = generate(
        folder,
        model,
        PROMPTS,
        max_tokens=TOKENS,
        adapters=list(adapters),
        env=TWO_RANKS if "tensor_parallel_size" in engine else None,
        quantization="fusedq",
        enable_lora=True,
        # On a CPU vLLM takes the last place for requests without an adapter: it has to be empty.
        max_loras=len(adapters) + 1,
        max_lora_rank=RANK,
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="bfloat16",
        **{"enforce_eager": True} | engine,
    )
    said = []
    for index, delta in enumerate((None, *adapters.values())):
        answered = answers[index * len(PROMPTS) :][: len(PROMPTS)]
        texts = [p + answer["tokens"] for p, answer in zip(PROMPTS, answered, strict=True)]
        expected = reference_logprobs(model, truths, texts, delta)
        for answer, wanted in zip(answered, expected, strict=True):
            assert mean_error(answer["logprobs"], wanted[-TOKENS:]) <= 0.03
        said.append([answer["tokens"] for answer in answered])
    assert all(a != b for a, b in combinations(said, 2))


def test_an_adapter_beside_the_model(tmp_path: Path) -> None:
    """In the model's own directory, where vLLM alone reads it as weights; lm_head is quantized."""
    model = tmp_path / "model"
    head, edit = quantized_head("gptq-sym", SIZES["hidden"])
    config = config_with_head("gptq-sym")
    edits = [random_tables, edit]
    truths = write_checkpoint(model, "gptq-sym", edits=edits, config=config, **SIZES)
    adapters = {model: write_adapter(model, truths)}
    compare(tmp_path, model, truths | {"lm_head": head}, adapters)


@pytest.mark.parametrize("name", [*ENGINES, *MORE_ENGINES])
def test_adapters_at_once(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """Of two ranks and on other layers: one on all, one on queries and values, one on the MLP."""
    if name in MORE_ENGINES and not request.config.getoption("--all-models"):
        pytest.skip("needs --all-models")
    build, engine = (ENGINES | MORE_ENGINES)[name]
    model = tmp_path / "model"
    truths = write_checkpoint(model, build, edits=[random_tables], **SIZES)
    adapters = {}
    for seed, (rank, parts) in enumerate(
        [(RANK, ("proj",)), (RANK // 2, ("q_proj", "v_proj")), (RANK, ("up_proj", "down_proj"))]
    ):
        on = {module: truth for module, truth in truths.items() if module.endswith(parts)}
        path = tmp_path / f"adapter{seed}"
        adapters[path] = write_adapter(path, on, rank, seed)
    compare(tmp_path, model, truths, adapters, **engine)
