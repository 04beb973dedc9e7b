"""Falcon's rows, stored head group by head group, are loaded exactly at every split."""

from pathlib import Path

import pytest

from checkpoints import AWQ_BUILDS, BUILDS
from loading import assert_exact, load, plans_of
from random_models import falcon_config, write_random_model
from vllm_fusedq.checkpoint.read import read_checkpoint

MODULE = "transformer.h.0.self_attention.query_key_value"


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
