"""Rows that vLLM orders otherwise than the file: each rank loads its own exactly at every split."""

from itertools import product
from pathlib import Path

import pytest

from checkpoints import AWQ_BUILDS, BUILDS
from loading import DEVICES, assert_exact, load, plans_of
from random_models import falcon_config, falcon_h1_config, write_random_model
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.load.convert import convert

MODULE = "transformer.h.0.self_attention.query_key_value"
STATES = "model.layers.0.mamba.in_proj"


@pytest.mark.parametrize("build", [*BUILDS, *AWQ_BUILDS])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_rank_holds_its_heads(tmp_path: Path, build: str, kv_heads: int) -> None:
    model = write_random_model(tmp_path, falcon_config(4, kv_heads), build)
    checkpoint = read_checkpoint(tmp_path)
    for tp_size in (1, 2, 4):
        for rank in range(tp_size):
            plans = plans_of(checkpoint, "cpu", tp_size, rank)
            plan = next(plan for plan in plans if plan.prefix == MODULE)
            assert len(plan.shard.parts) > 1
            assert plan.n == 256 // tp_size + 2 * 64 * max(kv_heads // tp_size, 1)
            assert_exact(load(plan, tmp_path), model.truths)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("build", [*BUILDS, *AWQ_BUILDS])
def test_every_rank_holds_its_mamba_heads_and_all_states(
    tmp_path: Path, build: str, converted: bool
) -> None:
    """256 rows of the gate and of x, 32 of B and of C, 32 heads."""
    model = write_random_model(tmp_path / "model", falcon_h1_config(), build)
    if converted:
        convert(model.path, tmp_path / "out")
    path = tmp_path / "out" if converted else model.path
    checkpoint = read_checkpoint(path)
    for device, tp_size in product(DEVICES, (1, 2, 4)):
        for rank in range(tp_size):
            plans = plans_of(checkpoint, device, tp_size, rank)
            plan = next(plan for plan in plans if plan.prefix == STATES)
            assert plan.n == (2 * 256 + 32) // tp_size + 2 * 32
            assert_exact(load(plan, path), model.truths)
