"""A sliced prefill is named, with its workspace, wherever a plan is shown; and can be forbidden."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile

from checkpoints import write_checkpoint
from fusedq_kernels import ops, reference
from fusedq_kernels.choose import slices
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.types import Policy
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.capacity import workspace_bytes
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import ModelPlan, plan_model
from vllm_fusedq.plan.uses import SHOWN_TOKENS
from vllm_fusedq.prove.trace import LayerTrace, judge, record
from vllm_fusedq.report.document import layers_json
from vllm_fusedq.report.table import plan_table, render, summary

TARGET = Target(device_by_name("sm_90"), torch.float16)
TOKENS = 65


@pytest.fixture
def checkpoint(tmp_path: Path, sliced_rows: Callable[..., None]) -> Path:
    """Measured rows send its down_proj, 1536 x 1024, to slices; shapes far from it have none."""
    path = tmp_path / "model"
    path.mkdir()
    write_checkpoint(path, "awq", hidden=1536, intermediate=1024, group_size=128)
    sliced_rows("uint4", 128, 1536, 1024)
    return path


def planned(path: Path, target: Target = TARGET) -> ModelPlan:
    return plan_model(read_checkpoint(path), target)


def test_a_plan_names_kernel_tokens_and_workspace(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkpoint)
    (down,) = (layer for layer in plan.layers if layer.prefix.endswith("down_proj"))
    assert [tokens for tokens, _ in down.main.launches] == [1, 65, 2048]
    assert down.main.beside == (65, down.launch(65))
    assert workspace_bytes(down) == 2 * 1536 * 1024
    text = " ".join(render(plan_table([down]), width=400).split())
    declared = "sliced-cublas from 65 tokens, 3.1 MB workspace, tuned:sm_90 row 3"
    assert f"; {declared}" in text
    assert "1 x triton-gemm + sliced-cublas" in summary([down], ())
    monkeypatch.setitem(SHOWN_TOKENS, "prefill", 128)
    text = " ".join(render(plan_table([down]), width=400).split())
    assert f" {declared}" in text
    assert f"; {declared}" not in text
    (row,) = layers_json([down])
    assert row["declared"] == {
        "kernel": "sliced-cublas",
        "tile": None,
        "source": "tuned:sm_90 row 3",
        "min_tokens": 65,
        "workspace_bytes": 2 * 1536 * 1024,
    }
    schema = Path(__file__).resolve().parents[2] / "docs" / "schemas" / "plan.v1.json"
    layer = json.loads(schema.read_text())["$defs"]["layer"]
    (known, _) = layer["properties"]["declared"]["anyOf"]
    assert set(row["declared"]) == set(known["required"])


@pytest.mark.parametrize("policy", [Policy(sliced_prefill=False), Policy(batch_invariant=True)])
def test_nothing_is_declared_where_it_may_not_run(checkpoint: Path, policy: Policy) -> None:
    plan = planned(checkpoint, replace(TARGET, policy=policy))
    assert {layer.main.beside for layer in plan.layers} == {None}
    assert "sliced-cublas" not in render(plan_table(plan.layers), width=400)
    assert {row["declared"] for row in layers_json(plan.layers)} == {None}


def trace(path: Path, call: Callable[..., object]) -> LayerTrace:
    (plan,) = (each for each in planned(path).layers if each.prefix.endswith("down_proj"))
    loader = LayerLoader.create(plan, torch.float16, torch.device("cpu"))
    with safe_open(path / "model.safetensors", "pt") as file:
        for stored in plan.formats[0].tensors:
            loader.add(stored.name, file.get_tensor(f"{plan.prefix}.{stored.name}"))
    x = torch.ones(TOKENS, plan.k, dtype=torch.float16)
    with (
        profile(
            activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
        ) as found,
        record(plan.prefix),
    ):
        call(x, loader.packed)
    return judge(plan, plan.main, loader.packed, found.events(), TOKENS)


def sliced(x: torch.Tensor, packed: object) -> torch.Tensor:
    return ops.matmul(x, packed, None, "triton-gemm")


def test_a_trace_proves_that_no_more_than_a_slice_was_dequantized(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 1 << 20)
    found = trace(checkpoint, sliced)
    assert found.problems == ()
    assert found.kernels == ("aten::mm",)
    assert found.largest == 1 << 20
    whole = trace(checkpoint, lambda x, packed: x @ reference.dequantize(unpack(packed)).half().t())
    assert any("where activations and workspace explain" in each for each in whole.problems)
    assert "0 fused operators in one call" in whole.problems
