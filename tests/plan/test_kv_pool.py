"""The KV cache against vLLM: its models, specs and pool for the same config.json."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attention_models import MODELS
from fusedq_kernels.dtype import DType
from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.plan.capacity import Demand, block_count, caches_of
from vllm_fusedq.plan.kv_pool import CPU_POOL, GPU_POOL, PoolSettings, pool_of
from vllm_fusedq.plan.layer_caches import Keys, LayerCaches
from vllm_fusedq.plan.states import State

ORACLE = Path(__file__).parents[1] / "support" / "vllm_kv_cache.py"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
}
LENGTH = 32768
POOLS = {"gpu": GPU_POOL, "cpu": CPU_POOL}
# vLLM refuses query heads, and groups of a state, that ranks do not divide
MOST_RANKS = {"Falcon-H1-34B": 2, "Granite-4.0-H-Tiny": 4}


def _ask(name: str, tp: int, kv_cache_dtype: str = "auto", device: str = "gpu") -> dict[str, Any]:
    rest = {"kv_cache_dtype": kv_cache_dtype, "device": device, "length": LENGTH}
    return {"name": name, "tp": min(tp, MOST_RANKS.get(name, tp)), **rest}


ASKED = [
    *(_ask(name, tp) for name in MODELS for tp in (1, 2, 8)),
    *(
        _ask(name, 2, "fp8")
        for name in ("Gemma-4-31B", "DeepSeek-V3", "Qwen3-Next-80B", "Jamba-v0.1")
    ),
    *(_ask(name, 1, device="cpu") for name in ("Gemma-3-27B", "Qwen3.5-27B", "Nemotron-H-8B")),
]


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, int]]:
    """vLLM's bytes of a sequence for everything that is asked, in one process."""
    asked = [ask | {"config": MODELS[ask["name"]]} for ask in ASKED]
    run = subprocess.run(
        [sys.executable, ORACLE],
        input=json.dumps(asked),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    return {_id(ask): answer for ask, answer in zip(ASKED, found, strict=True)}


def _id(ask: dict[str, Any]) -> str:
    return f"{ask['name']} tp{ask['tp']} {ask['kv_cache_dtype']} {ask['device']}"


@pytest.mark.parametrize("ask", ASKED, ids=_id)
def test_a_sequence_takes_what_vllm_says(
    ask: dict[str, Any], answers: dict[str, dict[str, int]]
) -> None:
    checkpoint = Checkpoint("model", MODELS[ask["name"]], {}, "quantization_config", {})
    demand = Demand(kv_cache_dtype=ask["kv_cache_dtype"], pool=POOLS[ask["device"]])
    caches = caches_of(checkpoint, ask["tp"], DType.BFLOAT16, demand)
    blocks = block_count(checkpoint)
    assert caches is not None
    assert caches.unmodelled == ()
    pool = pool_of(caches, demand.pool.tokens)
    once, twice = (
        pool.sequence_bytes(length, demand.in_flight, 0, blocks) for length in (LENGTH, 2 * LENGTH)
    )
    theirs = answers[_id(ask)]
    assert (once, twice) == (theirs["once"], theirs["twice"])
    # Blocks are whole: with a state's large ones the last is rarely full
    per_token = (theirs["twice"] - theirs["once"]) / LENGTH
    assert pool.token_bytes(0, blocks) == pytest.approx(per_token, rel=0.02)


def _pool(*caches: tuple[Any, ...], tokens: int = 16) -> Any:
    return pool_of(LayerCaches(tuple(caches), ()), tokens)


def test_a_pipeline_stage_holds_its_own_layers_of_every_table() -> None:
    """By hand: four layers of two kinds, two tables of two layers, one of each in a stage."""
    every, window = Keys(100), Keys(100, window=33)
    pool = _pool((every,), (window,), (every,), (window,))
    # 64 tokens in 4 blocks; the last 32 and 16 in flight in 3, and one where the window begins
    assert pool.sequence_bytes(64, 16, 0, 4) == (4 + 4) * 2 * 16 * 100
    assert pool.sequence_bytes(64, 16, 0, 2) == (4 + 4) * 16 * 100
    assert pool.token_bytes(0, 4) == 2 * pool.token_bytes(0, 2) == 200


def test_in_flight_tokens_are_those_of_every_stages_batch() -> None:
    demand = Demand(pipeline_parallel_size=3, max_num_batched_tokens=100, pool=PoolSettings(16, 2))
    assert demand.in_flight == 400


def test_states_have_pages_of_attention_that_is_stretched_to_them() -> None:
    """By hand: a state of 5,000 bytes beside tokens of 100: 64 tokens of attention in a block."""
    pool = _pool((Keys(100),), (State(5000, 2),))
    assert [group.tokens for group in pool.groups] == [64, 64]
    assert pool.sequence_bytes(65, 16, 0, 2) == (2 + 2) * 6400


def test_nothing_kept_takes_nothing() -> None:
    assert _pool((), ()).sequence_bytes(1000, 16, 0, 2) == 0
