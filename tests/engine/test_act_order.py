"""GPTQ activation reordering: the same weights with and without it give the same answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import Tensors, replace, write_checkpoint, write_json
from engines import generate, mean_error

pytestmark = pytest.mark.engine

GROUP, RUN = 32, 8
PROMPTS = [[(7 * i + 3 * j) % 30 for i in range(48)] for j in range(4)]


def order_in_runs(tensors: Tensors) -> None:
    """Reorder whole runs of 8 in_features, so that groups of 8 can say the same in order."""
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        k = len(tensors[name])
        order = np.random.default_rng(k).permutation(k // RUN)
        tensors[name] = torch.from_numpy(order // (GROUP // RUN)).repeat_interleave(RUN).int()


def write_reordered(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [
        replace(
            f"{name}.weight", lambda t: (torch.randn(t.shape, generator=generator) / 16).to(t.dtype)
        )
        for name in ("model.embed_tokens", "lm_head")
    ]
    sizes = {"hidden": 256, "intermediate": 448, "group_size": GROUP, "layers": 2}
    write_checkpoint(path, "gptq-asym-order", edits=[*tables, order_in_runs], **sizes)


def write_the_same_in_order(source: Path, path: Path) -> None:
    """The checkpoint in `source` without activation reordering: each run of 8 is a group."""
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        group_of_run = tensors.pop(name)[::RUN].long()
        assert not torch.equal(group_of_run, group_of_run.sort().values)
        for suffix in ("qzeros", "scales"):
            module = name.removesuffix(".g_idx")
            tensors[f"{module}.{suffix}"] = tensors[f"{module}.{suffix}"][group_of_run]
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {"desc_act": False, "group_size": RUN}
    write_json(path / "config.json", config)


def answers(folder: Path, model: Path, tp_size: int = 1) -> list[dict[str, Any]]:
    return generate(
        folder,
        model,
        PROMPTS,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tp_size == 2 else None,
        quantization="fusedq",
        tensor_parallel_size=tp_size,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="bfloat16",
    )


def test_an_order_changes_nothing_but_the_rounding(tmp_path: Path) -> None:
    reordered, in_order = tmp_path / "reordered", tmp_path / "in-order"
    write_reordered(reordered)
    write_the_same_in_order(reordered, in_order)
    expected = answers(tmp_path, in_order)
    for tp_size in (1, 2):
        found = answers(tmp_path, reordered, tp_size)
        for a, b in zip(found, expected, strict=True):
            assert mean_error(a["prompt_logprobs"], b["prompt_logprobs"]) <= 0.03, tp_size
