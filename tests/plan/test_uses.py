"""A plan is of a weight and says what is done with it; it alone asks for launches."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints import write_checkpoint
from fusedq_kernels.catalogue import Op
from fusedq_kernels.choose.device import cpu_device, device_by_name
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.plan.layer import LayerPlan, Target, plan_layer
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.plan.shards import shard_embedding
from vllm_fusedq.plan.uses import SHOWN_TOKENS
from vllm_fusedq.report.document import layers_json
from vllm_fusedq.report.table import plan_table, render
from vllm_fusedq.settings import Settings
from vllm_fusedq.worker.state import WorkerState

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_fusedq"
STRIPED = Target(cpu_device(), torch.bfloat16, "cpu-striped")
H200 = Target(device_by_name("h200"), torch.bfloat16)


def down_proj(path: Path, target: Target) -> LayerPlan:
    layers = plan_model(read_checkpoint(path), target).layers
    return next(layer for layer in layers if layer.prefix.endswith("0.mlp.down_proj"))


def test_nothing_else_asks_for_a_launch() -> None:
    """A launch is of a `GemmShape`, or comes from the rules themselves.

    What `measure/` tries is no launch of a layer.
    """
    asking = {
        source.relative_to(PACKAGE).as_posix()
        for source in PACKAGE.rglob("*.py")
        if source.parent.name != "measure"
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in (*(alias.name for alias in node.names), getattr(node, "module", None) or "")
        if name.rpartition(".")[2] in ("GemmShape", "select", "heuristics")
    }
    assert asking == {"plan/uses.py"}


def test_uses_are_what_the_shard_asks_for_and_the_last_decides(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", hidden=128)
    plan = down_proj(tmp_path, STRIPED)
    assert [use.op for use in plan.uses] == [Op.MATMUL]
    formats = {plan.formats[0].module: plan.formats[0]}
    for tied, ops in ((False, [Op.EMBEDDING]), (True, [Op.EMBEDDING, Op.MATMUL])):
        shard = shard_embedding(plan.prefix, plan.n, plan.k, 1, 0, tied)
        found = plan_layer(shard, formats, H200)
        assert [use.op for use in found.uses] == ops
        assert {use.call.layout for use in found.uses} == {found.layout}
        assert found.launch(1).kernel == found.uses[-1].call.kernel
        assert found.use(ops[-1]) is found.main
    assert plan.use(Op.EMBEDDING) is None


def test_a_plan_shows_the_launches_that_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", hidden=128)
    (use,) = down_proj(tmp_path, H200).uses
    assert [tokens for tokens, _ in use.launches] == list(SHOWN_TOKENS.values())
    assert use.launches == tuple((tokens, use.launch(tokens)) for tokens, _ in use.launches)


@pytest.fixture
def pair(tmp_path: Path) -> list[LayerPlan]:
    """Two equal weights of one vLLM layer, as one of experts has them."""
    write_checkpoint(tmp_path, "awq")
    plan = down_proj(tmp_path, STRIPED)
    shards = [replace(plan.shard, prefix="experts", weight=weight) for weight in ("w13", "w2")]
    return [replace(plan, shard=shard) for shard in shards]


def test_two_weights_of_a_layer_are_two_plans(tmp_path: Path, pair: list[LayerPlan]) -> None:
    assert [plan.name for plan in pair] == ["experts.w13", "experts.w2"]
    assert [row["layers"] for row in layers_json(pair)] == ["experts.w13", "experts.w2"]
    text = render(plan_table(pair))
    assert "experts.w13 " in text
    assert "experts.w2 " in text
    state = WorkerState(STRIPED, Settings(), max_tokens=8)
    state.plans.extend(pair)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for plan in pair:
            loader = LayerLoader.create(plan, torch.bfloat16, torch.device("cpu"))
            (module,) = {part.module for part in plan.shard.parts}
            for stored in plan.formats[0].tensors:
                loader.add(stored.name, file.get_tensor(f"{module}.{stored.name}"))
            state.layer_loaded(loader, has_bias=False)
    document = state.document()
    assert document["counts"]["fused"] == 2
    # Weights of one shape and scheme share a launch
    assert document["warm_up"]["launches"] == 1
