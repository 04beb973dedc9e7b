"""The plan as text."""

from pathlib import Path

import torch

from checkpoints import write_checkpoint
from fusedq_kernels.device import cpu_device
from vllm_fusedq.checkpoint import read_checkpoint
from vllm_fusedq.plan import Target
from vllm_fusedq.preflight import plan_model
from vllm_fusedq.report import plan_table, render, summary


def test_equal_layers_are_one_row_with_the_kernel_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", layers=3)
    plan = plan_model(read_checkpoint(tmp_path), Target(cpu_device(fused_op=True), torch.bfloat16))
    table = plan_table(plan.layers)
    assert table.row_count == 4
    text = render(table)
    assert "model.layers.0-2.mlp.down_proj x3" in text
    assert "awq 4-bit g32, zero points" in text
    assert text.count("cpu-wna16") == 4
    assert summary(plan.layers, plan.unquantized) == (
        "fused: 12 (12 x cpu-wna16); unquantized by the checkpoint: 2; fallbacks: 0"
    )


def test_rows_that_an_activation_order_adds_are_shown(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym-order", layers=3)
    target = Target(cpu_device(fused_op=True), torch.bfloat16)
    text = render(plan_table(plan_model(read_checkpoint(tmp_path), target, tp_size=2).layers))
    # 48 of 96 in_features may touch all 3 groups, each padded to 32
    assert "48 as 96 x 64" in text
    assert "gptq 4-bit g32, symmetric, act-order" in text
