"""Rows of a Mamba-2 layer with one group of B and C, against vLLM's loader of plain weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import add, rename, write_checkpoint, write_json
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.plan.model_code import state_rows
from vllm_fusedq.plan.shards import UnevenSplit
from vllm_fusedq.plan.state_rows import StateRows

INNER, STATE, HEADS = 64, 16, 8
ROWS = StateRows(INNER, 2 * STATE, HEADS)
MODULE = "model.layers.0.mamba.in_proj"


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_a_rank_holds_what_vllm_loads(tp_size: int) -> None:
    mixer = pytest.importorskip("vllm.model_executor.layers.mamba.mamba_mixer2")
    stored = torch.arange(2 * INNER + 2 * STATE + HEADS)
    copies = STATE * (tp_size - 1)
    state = (STATE + copies, copies, True)
    spec = [(INNER, 0, False), (INNER, 0, False), state, state, (HEADS, 0, False)]
    for rank in range(tp_size):
        wanted = torch.full(((2 * INNER + HEADS) // tp_size + 2 * STATE,), -1)
        mixer.mamba_v2_sharded_weight_loader(spec, tp_size, rank)(wanted, stored)
        parts = ROWS.shard("in_proj", 32, tp_size, rank)
        regions = [part.region for part in parts]
        found = torch.cat([stored[region.n_start : region.n_stop] for region in regions])
        assert torch.equal(found, wanted)
        assert {part.module for part in parts} == {"in_proj"}
        assert {(region.k_start, region.k_stop) for region in regions} == {(0, 32)}


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnevenSplit, match=r"64 out_features \(8 Mamba heads\) cannot be cut into"):
        ROWS.shard("in_proj", 32, 3, 0)


@pytest.mark.parametrize(
    ("config", "convolved", "module", "expected"),
    [
        ({"mamba_n_groups": 1}, 32 + 16, MODULE, StateRows(32, 16, 8)),
        ({"n_groups": 1}, 32 + 16, MODULE, StateRows(32, 16, 8)),
        ({"mamba_ngroups": 1}, 32 + 16, MODULE, StateRows(32, 16, 8)),
        ({"mamba_n_groups": 2}, 32 + 16, MODULE, None),
        ({}, 32 + 16, MODULE, None),
        ({"n_groups": 1}, 32 + 16, "model.layers.0.mlp.in_proj", None),
        ({"n_groups": 1}, 32 + 16, "model.layers.0.mamba.x_proj", None),
        # No states, and less rows than are convolved
        ({"n_groups": 1}, 40, MODULE, None),
        ({"n_groups": 1}, 100, MODULE, None),
    ],
)
def test_rows_by_the_tensors_beside_them(
    tmp_path: Path, config: dict[str, Any], convolved: int, module: str, expected: StateRows | None
) -> None:
    """88 rows: gate and x of 32, B and C of 8, 8 heads."""
    beside = {"conv1d.weight": torch.zeros(convolved, 1, 4), "dt_bias": torch.zeros(8)}
    edits = [add(f"model.layers.0.mamba.{name}", tensor) for name, tensor in beside.items()]
    write_checkpoint(tmp_path, edits=[rename("model.layers.0.mlp.up_proj", MODULE), *edits])
    write_json(tmp_path / "config.json", read_checkpoint(tmp_path).config | config)
    assert state_rows(read_checkpoint(tmp_path), module, 88) == expected
