"""The plan as text."""

import io
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from checkpoints import add, gptq_tensors, random_truth, write_checkpoint
from fusedq_kernels.choose.device import cpu_device
from tiny_models import asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import Problem
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.report.table import fitting_plan, plan_rows, plan_table, render, summary


def test_equal_layers_are_one_row_with_the_kernel_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", layers=3)
    plan = plan_model(read_checkpoint(tmp_path), Target(cpu_device(), torch.bfloat16))
    table = plan_table(plan.layers)
    assert table.row_count == 4
    text = render(table)
    assert "model.layers.0-2.mlp.down_proj x3" in text
    assert "awq 4-bit g32, zero points" in text
    assert text.count("cpu-fused") == 4
    assert summary(plan.layers, plan.unquantized) == (
        "fused: 12 (12 x cpu-fused); unquantized by the checkpoint: 2; fallbacks: 0"
    )


def test_layers_of_other_sizes_are_rows_of_their_own() -> None:
    target = Target(cpu_device(), torch.bfloat16)
    layers = plan_model(read_checkpoint(asset("tiny-llama-awq-g128")), target).layers
    first, second = (plan for plan in layers if plan.prefix.endswith("o_proj"))
    assert [row.count for row in plan_rows([first, second])] == [2]
    other = replace(second, resident=(("qweight", 1), *second.resident[1:]))
    assert [row.count for row in plan_rows([first, other])] == [1, 1]


def test_bits_per_weight_count_metadata() -> None:
    target = Target(cpu_device(), torch.bfloat16)
    plan = plan_model(read_checkpoint(asset("tiny-llama-awq-g128")), target).layers[0]
    # 4, and a word of scale and zero point for each 128
    assert plan.bits_per_weight == 4 + 32 / 128
    assert "4.25" in render(plan_table([plan]))


def test_a_narrow_console_cuts_no_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", layers=3)
    plan = plan_model(read_checkpoint(tmp_path), Target(cpu_device(), torch.bfloat16))
    refused = Problem("model.layers.7.mlp.down_proj (out_features x in_features)", "", "", "")
    narrow, wide = io.StringIO(), io.StringIO()
    for file, width in ((narrow, 60), (wide, 200)):
        console = Console(file=file, width=width, color_system=None)
        console.print(fitting_plan(console, plan.layers, [refused]))
    lines = [line.rstrip() for line in narrow.getvalue().splitlines()]
    assert max(map(len, lines)) <= 60
    assert "model.layers.0-2.self_attn.qkv_proj x3" in lines
    assert lines.count("  format          awq 4-bit g32, zero points") == 4
    assert lines.count("  kernel          cpu-fused") == 4
    assert "model.layers.7.mlp.down_proj: refused" in lines
    assert wide.getvalue() == render(plan_table(plan.layers, [refused]), 200)


def test_a_mixed_model_names_widths_and_kernels_layer_by_layer() -> None:
    target = Target(cpu_device(), torch.bfloat16)
    plan = plan_model(read_checkpoint(asset("tiny-llama-gptq-mixed")), target)
    found = {
        layer.prefix.removeprefix("model.layers."): (
            layer.formats[0].description,
            layer.kernel_names,
            layer.weight_bytes,
        )
        for layer in plan.layers
    }
    eight = ("gptq 8-bit g128, symmetric", "cpu-fused")
    four = ("gptq 4-bit g32, zero points, act-order", "cpu-fused")
    three = ("gptq 3-bit g32, symmetric, resident as 4-bit", "cpu-fused")
    two = ("gptq 2-bit g32, zero points, resident as 4-bit", "cpu-fused")
    assert found == {
        "0.self_attn.qkv_proj": (*eight, 512 * 256),
        "0.self_attn.o_proj": (*eight, 256 * 256),
        "0.mlp.gate_up_proj": (*four, 512 * 256 // 2),
        "0.mlp.down_proj": (*four, 256 * 256 // 2),
        "1.self_attn.qkv_proj": (*three, 512 * 256 // 2),
        "1.self_attn.o_proj": (*three, 256 * 256 // 2),
        "1.mlp.gate_up_proj": (*two, 512 * 256 // 2),
        "1.mlp.down_proj": (*two, 256 * 256 // 2),
    }
    assert "8 x cpu-fused" in summary(plan.layers, plan.unquantized)


def test_parts_stored_in_different_widths_are_all_shown(tmp_path: Path) -> None:
    """3- and 4-bit parts of a fused layer are resident alike, and run as one."""
    truth = random_truth(96, 64, 32, zero_range=None, bits=3)
    edits = [
        add(f"model.layers.0.mlp.up_proj.{name}", tensor)
        for name, tensor in gptq_tensors(truth).items()
    ]
    dynamic = {r"+:.*up_proj": {"bits": 3}}
    write_checkpoint(tmp_path, "gptq-sym", config={"dynamic": dynamic}, edits=edits)
    plan = plan_model(read_checkpoint(tmp_path), Target(cpu_device(), torch.bfloat16))
    text = " ".join(render(plan_table(plan.layers), width=300).split())
    assert "gptq 4-bit g32, symmetric + gptq 3-bit g32, symmetric, resident as 4-bit" in text


def test_rows_that_an_activation_order_adds_are_shown(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym-order", layers=3)
    target = Target(cpu_device(), torch.bfloat16)
    text = render(plan_table(plan_model(read_checkpoint(tmp_path), target, tp_size=2).layers))
    # 48 of 96 in_features may touch all 3 groups and fill 5 more steps of 8
    assert "48 as 64 x 64" in text
    assert "gptq 4-bit g32, symmetric, act-order" in text
