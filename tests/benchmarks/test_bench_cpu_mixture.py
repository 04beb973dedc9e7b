"""The mixture in bf16 is what the quantized one is worth; both are timed in turn and compared."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bench_cpu_mixture
from fusedq_kernels import reference
from fusedq_kernels.choose.device import cpu_device
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.formats import format_for
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model


def test_both_models_have_the_same_weights(tmp_path: Path) -> None:
    shape = bench_cpu_mixture.TINY
    models = bench_cpu_mixture.write_models(tmp_path, shape)
    checkpoint = read_checkpoint(models["fusedq"])
    plan = plan_model(checkpoint, Target(cpu_device(), torch.bfloat16))
    assert [layer.shard.count for layer in plan.layers] == [
        shape.num_experts,
        shape.num_experts,
        1,
        1,
    ]
    name = "model-00001.safetensors"
    stored, plain = (load_file(models[side] / name) for side in ("fusedq", "bf16"))
    for module in ("mlp.experts.7.down_proj", "mlp.experts.0.gate_proj", "self_attn.q_proj"):
        module = f"model.layers.0.{module}"
        layer = format_for(checkpoint).layer_of(module)
        tensors = {each.name: stored[f"{module}.{each.name}"] for each in layer.tensors}
        weight = reference.dequantize(layer.packing.logical(tensors, layer, layer.whole))
        assert torch.equal(plain[f"{module}.weight"], weight.bfloat16())
    assert {name.rpartition(".")[2] for name in plain} == {"weight"}
    assert torch.equal(
        plain["model.layers.0.mlp.gate.weight"], stored["model.layers.0.mlp.gate.weight"]
    )


def test_the_dry_run_times_each_side_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run_side(model: Path, side: str, repeat: int, cases: object) -> list[dict[str, object]]:
        asked.append((model.name, (model / "config.json").exists(), repeat))
        return [
            {
                "model": model.name,
                "case": name,
                "side": side,
                "repeat": "0.0",
                "seconds": 1,
                "tokens_per_s": 30 if side == "fusedq" else 10,
            }
            for name, *_ in cases
        ]

    monkeypatch.setattr(bench_cpu_mixture, "run_side", run_side)
    out = tmp_path / "mixture.csv"
    monkeypatch.setattr(sys, "argv", ["bench", "--csv", str(out), "--dry-run"])
    bench_cpu_mixture.main()
    assert asked == [("bf16", True, 0), ("fusedq", True, 0)]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["case"]) for row in rows] == [
        ("mixture", case) for _ in asked for case in ("decode-1", "decode-8")
    ]
    assert capsys.readouterr().out.count("ratio 3.000") == 2
