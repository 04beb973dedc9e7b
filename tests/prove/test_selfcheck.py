"""`fusedq selfcheck`: passes what is right, on every kernel that runs here, and catches damage."""

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checkpoints import ALL_BUILDS, add, drop, write_checkpoint
from fusedq_kernels import experts
from fusedq_kernels.activation import Activation
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import LogicalWeight, PackedWeight
from heads import config_with_head, quantized_head
from mixtures import write_mixture
from random_models import falcon_config, write_random_model
from tiny_models import asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.cli import app
from vllm_fusedq.load.convert import convert
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.prove.launches import LoadedLayer
from vllm_fusedq.prove.selfcheck import LayerCheck, check_layer

AWQ = ("qweight", "qzeros", "scales")
STRIPED = Target(cpu_device(), torch.float16, "cpu-striped", keeps_activations=True)


def check_all(path: Path) -> list[LayerCheck]:
    checkpoint = read_checkpoint(path)
    plans = plan_model(checkpoint, STRIPED).layers
    return [check_layer(checkpoint, plan, STRIPED, torch.device("cpu")) for plan in plans]


@pytest.mark.parametrize("build", ALL_BUILDS)
def test_what_is_right_passes(tmp_path: Path, build: str) -> None:
    write_checkpoint(tmp_path, build, hidden=128, intermediate=192)
    checks = check_all(tmp_path)
    assert len(checks) == 4
    for check in checks:
        assert check.passed
        assert check.wrong_values == 0
        # The striped kernel computes in fp32: what is left is the rounding of the result
        assert 0 < check.max_error < check.limit


def test_an_lm_head_and_a_converted_checkpoint_pass(tmp_path: Path) -> None:
    _, edit = quantized_head("gptq-sym", 128)
    config = config_with_head("gptq-sym")
    write_checkpoint(tmp_path / "source", "gptq-sym", hidden=128, edits=[edit], config=config)
    convert(tmp_path / "source", tmp_path / "out")
    for checks in (check_all(tmp_path / "source"), check_all(tmp_path / "out")):
        assert "lm_head" in {check.plan.prefix for check in checks}
        assert all(check.passed for check in checks)


def test_rows_in_head_groups_pass(tmp_path: Path) -> None:
    write_random_model(tmp_path, falcon_config(kv_heads=2), "awq")
    checks = check_all(tmp_path)
    assert len(checks) == 4
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("build", ["awq", "gptq-asym-order", "bnb-nf4"])
def test_experts_pass_as_one_layer(tmp_path: Path, build: str) -> None:
    write_mixture(tmp_path, build)
    checks = check_all(tmp_path)
    assert [check.plan.name.rpartition(".")[2] for check in checks] == ["w13", "w2", "o_proj"]
    assert all(check.passed and check.max_error > 0 for check in checks)


def test_a_wrong_value_of_one_expert_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixture(tmp_path)
    original = packing.pack_rows
    calls = []

    def wrong(packed: PackedWeight, start: int, rows: LogicalWeight) -> None:
        calls.append(packed)
        if len(calls) == 3:
            rows.codes[17, 5] ^= 1
        original(packed, start, rows)

    monkeypatch.setattr(packing, "pack_rows", wrong)
    assert [check.wrong_values for check in check_all(tmp_path)] == [1, 0, 0]


@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
def test_a_wrongly_packed_value_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_checkpoint(tmp_path, "awq", hidden=128, intermediate=192)
    original = packing.pack_rows

    def wrong(packed: PackedWeight, start: int, rows: LogicalWeight) -> None:
        value = getattr(rows, name).view(-1)
        value[3] = value[3] / 2 if name == "scales" else (value[3] + 1) % 16
        original(packed, start, rows)

    monkeypatch.setattr(packing, "pack_rows", wrong)
    for check in check_all(tmp_path):
        assert check.wrong_values >= 1
        assert not check.passed


def test_a_kernel_that_reads_wrongly_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_fusedq.prove import selfcheck

    write_checkpoint(tmp_path, "awq", hidden=128, intermediate=192)
    original = selfcheck.ops.matmul
    monkeypatch.setattr(
        selfcheck.ops, "matmul", lambda x, *rest: original(x.roll(1, dims=1), *rest)
    )
    for check in check_all(tmp_path):
        assert check.wrong_values == 0
        assert check.max_error > check.limit
        assert not check.passed


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs where no GPU is")
def test_on_a_gpu_every_launch_is_compared_in_both_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the interpreter stand for those of a GPU."""
    from fusedq_kernels import ops
    from vllm_fusedq.prove import selfcheck

    truths, truth = [], LoadedLayer.truth
    monkeypatch.setattr(LoadedLayer, "truth", lambda *a: truths.append(truth(*a)) or truths[-1])
    monkeypatch.setattr(selfcheck, "on_gpu", lambda packed: True)
    monkeypatch.setattr(selfcheck, "MAX_TOKENS", 20)
    write_checkpoint(tmp_path, "awq", hidden=128, intermediate=192)
    checkpoint = read_checkpoint(tmp_path)
    target = Target(device_by_name("h200"), torch.float16)
    qkv = next(each for each in plan_model(checkpoint, target).layers if "qkv" in each.prefix)
    check = check_layer(checkpoint, qkv, target, torch.device("cpu"))
    assert check.passed
    # Three kinds of tiles for up to 20 tokens, and two in batch-invariant mode
    assert check.launches == 5
    assert len(truths) == 1
    real = ops.run

    def wrong_beyond_16(x, *rest, out):
        y = real(x, *rest, out=out)
        if len(x) > 16:
            y[-1, -1] += 1
        return y

    monkeypatch.setattr(ops, "run", wrong_beyond_16)
    check = check_layer(checkpoint, qkv, target, torch.device("cpu"))
    assert not check.passed
    assert "qkv_proj (uint4, groups of " in check.wrong_launch
    assert "with 17 tokens and no bias is wrong on h200" in check.wrong_launch


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs where no GPU is")
@pytest.mark.parametrize(
    ("gated", "kernel", "dtype"),
    [
        (True, "cpu-fused", torch.bfloat16),
        (True, "cpu-striped", torch.float16),
        (False, "cpu-fused", torch.float16),
    ],
    ids=str,
)
def test_experts_are_compared_with_each_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gated: bool, kernel: str, dtype: torch.dtype
) -> None:
    gates = [f"model.layers.0.mlp.experts.{e}.gate_proj.{name}" for e in range(4) for name in AWQ]
    write_mixture(tmp_path, edits=[] if gated else [drop(name) for name in gates])
    checkpoint = read_checkpoint(tmp_path)
    target = Target(cpu_device(), dtype, kernel)
    w13, w2 = (p for p in plan_model(checkpoint, target).layers if p.experts is not None)
    check = check_layer(checkpoint, w13, target, torch.device("cpu"), w2)
    assert check.passed
    assert check.launches == 2 + (5 if gated else 3)
    last = Activation("situ", 2.0, 1.5) if gated else Activation("relu2_no_mul")
    real = experts.experts

    def wrong(x, weights, ids, places, w13, w2, call):
        y = real(x, weights, ids, places, w13, w2, call)
        y[3, 7] += 0.2 * y.abs().max() * (call.activation == last)
        return y

    monkeypatch.setattr(experts, "experts", wrong)
    check = check_layer(checkpoint, w13, target, torch.device("cpu"), w2)
    assert not check.passed
    assert f"found 1 of {61 * 64} outputs wrong with {last} between" in check.wrong_launch
    assert "(the worst: token 3, output 7, " in check.wrong_launch


def test_on_a_gpu_the_launches_of_both_weights_of_experts_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedq_kernels.cuda.routing import Router
    from vllm_fusedq.prove import expert_passes, selfcheck

    monkeypatch.setattr(expert_passes, "GATED", expert_passes.GATED[:2])
    monkeypatch.setattr(selfcheck, "on_gpu", lambda packed: True)
    monkeypatch.setattr(selfcheck, "MAX_TOKENS", 2)
    monkeypatch.setattr(selfcheck, "TOKENS", (1,))
    bias = torch.full((96,), 0.5, dtype=torch.float16)
    names = [f"{number}.{name}" for number in range(2) for name in ("gate_proj", "up_proj")]
    edits = [add(f"model.layers.0.mlp.experts.{name}.bias", bias.clone()) for name in names]
    write_mixture(tmp_path, count=2, edits=edits)
    checkpoint = read_checkpoint(tmp_path)
    target = Target(device_by_name("h200"), torch.float16)
    w13, w2 = (p for p in plan_model(checkpoint, target).layers if p.experts is not None)
    device = torch.device("cpu")
    assert check_layer(checkpoint, w2, target, device).launches == 0
    check = check_layer(checkpoint, w13, target, device, w2)
    assert check.passed
    # One token and two, again in batch-invariant mode, and one with another activation
    assert check.launches == 4 + 1
    real = Router.sum

    def wrong(self, y, topk_weights, topk_ids, expert_map, out) -> None:
        real(self, y, topk_weights, topk_ids, expert_map, out)
        out[0, 0] += 1

    monkeypatch.setattr(Router, "sum", wrong)
    check = check_layer(checkpoint, w13, target, device, w2)
    assert not check.passed
    assert "model.layers.0.mlp.experts (2 experts, w13 uint4, groups of 32, " in check.wrong_launch
    assert "with 1 token is wrong on h200" in check.wrong_launch


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["selfcheck", *arguments])
    return result.exit_code, result.output


def test_prints_each_layer_and_the_worst_error() -> None:
    model = str(asset("tiny-llama-awq-g128"))
    code, printed = run(model, "--device", "cpu", "--kernel", "cpu-striped", "--dtype", "float16")
    assert code == 0, printed
    assert "\n  model.layers.1.mlp.gate_up_proj " in printed
    assert "\n  layer   " in printed
    assert "8 layers checked, 0 failed; worst error" in printed


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs where no GPU is")
def test_the_triton_kernel_in_its_interpreter() -> None:
    model = str(asset("tiny-llama-gptq-g128"))
    options = ("--device", "cpu", "--kernel", "triton-gemm", "--dtype", "float16")
    code, printed = run(model, *options, "--only", "layers.0.self_attn.o_proj")
    assert code == 0, printed
    assert "triton-gemm" in printed
    assert "1 layers checked, 0 failed" in printed


@pytest.mark.parametrize("asked", ["auto", "cpu-wna16"])
def test_the_fused_cpu_operators(wna16_op: None, asked: str) -> None:
    model = str(asset("tiny-llama-ct-asym-g32"))
    code, printed = run(model, "--device", "cpu", "--kernel", asked)
    assert code == 0, printed
    assert ("cpu-fused" if asked == "auto" else asked) in printed


def test_refusals(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq", config={"bits": 3})
    code, printed = run(str(tmp_path))
    assert code == 1
    assert "refused: " in printed
    assert "found bits 3" in printed
    model = str(asset("tiny-llama-awq-g128"))
    assert "device 'tpu'; choose auto, cpu or cuda" in run(model, "--device", "tpu")[1]
    assert "dtype 'int8'; choose bfloat16" in run(model, "--dtype", "int8")[1]
    assert "no quantized layer's name holds 'x.y'" in run(model, "--only", "x.y")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_wrong_usage() -> None:
    code, printed = run(str(asset("tiny-llama-awq-g128")), "--device", "cuda")
    assert code == 2
    assert "device 'cuda': torch finds no GPU; choose auto or cpu" in printed
