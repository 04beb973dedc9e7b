"""The benchmark of CPU kernels, tiny: its times mean nothing, its rows and plot are whole."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import bench_cpu
from gemmbench.cpu_experts import routings
from gemmbench.expert_shapes import MODELS, ExpertsShape
from vllm_fusedq.measure import contenders


def test_rows_of_a_layer_and_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(contenders, "COLD_BYTES", 1e5)
    monkeypatch.setattr(bench_cpu, "OWN", (("uint4b8", 128), ("nf4", 64), ("uint8b128", 128)))
    csv = tmp_path / "kernels.csv"
    bench_cpu.main(csv, "128x256", "1,3", 3, "dry-run")
    rows = pd.read_csv(csv, comment="#")
    own = rows[rows.contender.str.startswith("cpu-fused")]
    assert (own.over_bf16 > 0).all()
    assert (own.percent_read >= 0).all()
    of_layer = own[~own.contender.str.contains("experts")]
    assert list(of_layer.m) == [1] * 3 + [3] * 3
    experts = own[own.contender.str.contains("top 2 of 6 experts")]
    assert list(experts.contender.str.split().str[1]) == ["uint4b8", "nf4"]
    assert csv.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("name", MODELS)
def test_routings_ask_all_experts_in_turn(name: str, m: int) -> None:
    shape: ExpertsShape = MODELS[name]
    found = routings(shape, m)
    asked = torch.cat([each.ids.unique() for each in found])
    assert len(asked) == len(asked.unique())
    whole = shape.count // min(m * shape.top_k, shape.count) * min(m * shape.top_k, shape.count)
    assert len(asked) == whole
    assert all(len(row.unique()) == shape.top_k for each in found for row in each.ids)
