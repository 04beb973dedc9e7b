"""Whatever can be launched is audited."""

import json
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusedq_kernels.audit import variants
from fusedq_kernels.audit.compile import AUDIT_K
from fusedq_kernels.call import SCALED_BY_ROWS, SCALES_OF
from fusedq_kernels.catalogue import TRITON_GEMM, refusals
from fusedq_kernels.choose import heuristics, tuning
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.tiles import Rule, rules_for
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    DeviceSpec,
    GemmShape,
    Layout,
    Policy,
    QuantSpec,
    WeightType,
)

CAPABILITIES = sorted({device.capability for device in KNOWN_DEVICES.values()})


def rules(capability: tuple[int, int]) -> list[tuple[Rule, ...]]:
    device = DeviceSpec("any", "cuda", capability)
    choices = product(Layout, variants.STEPS, (False, True))
    return [rules_for(device, *each) for each in choices if each[0] in TILED_LAYOUTS.values()]


def audited(capability: tuple[int, int]) -> frozenset[object]:
    """Those of the first capability with the same rules; rows were measured on sm_90 alone."""
    return _audited(next(each for each in CAPABILITIES if rules(each) == rules(capability)))


@cache
def _audited(capability: tuple[int, int]) -> frozenset[object]:
    like = next(each for each in KNOWN_DEVICES.values() if each.capability == capability)
    return frozenset(each.key() for each in variants.launchable(like))


@st.composite
def devices(draw: st.DrawFn) -> DeviceSpec:
    known = draw(st.sampled_from(sorted(KNOWN_DEVICES.values(), key=lambda each: each.name)))
    unknown = replace(known, name="unknown", num_sms=draw(st.integers(1, 200)))
    return draw(st.sampled_from([known, unknown]))


@st.composite
def specs(draw: st.DrawFn, k: int) -> QuantSpec:
    group_size = draw(st.sampled_from([32, 64, 128, k]) | st.integers(1, 128).map(lambda i: 8 * i))
    weight_type = draw(st.sampled_from(WeightType))
    scale_dtype = draw(st.sampled_from(SCALES_OF[weight_type]))
    return QuantSpec(weight_type, group_size, scale_dtype, scale_dtype in SCALED_BY_ROWS)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), device=devices(), m=st.integers(1, 130) | st.integers(1, 20000))
def test_whatever_is_chosen_is_audited(data: st.DataObject, device: DeviceSpec, m: int) -> None:
    n = 8 * data.draw(st.integers(1, 4096))
    k = 16 * data.draw(st.integers(1, 2048))
    spec = data.draw(specs(k))
    phase = 16 * data.draw(st.integers(0, 8)) % spec.group_size
    act_dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16]))
    assume(not refusals(TRITON_GEMM, n, k, spec, phase))
    # The choice knows no phase: of a rank shorter than a group, that it spans two.
    steps = {group_geometry(k, spec.group_size, each).step for each in (0, phase)}
    assume(len(steps) == 1)
    launch = heuristics.select(
        GemmShape(m, n, k), spec, device, Policy(batch_invariant=data.draw(st.booleans()))
    )
    assert launch.kernel == "triton-gemm"
    has_bias = data.draw(st.booleans())
    found = variants.standing_for(launch.tile, spec, k, phase, act_dtype, has_bias)
    assert found.key() in audited(device.capability)


def test_a_measured_row_is_audited(tmp_path, monkeypatch) -> None:
    unmeasured = audited((9, 0))
    shape = {"weight_type": "nf4", "group_size": 64, "n": 4096, "k": 4096, "max_m": 64}
    tile = {"block_m": 32, "block_n": 32, "num_warps": 1, "num_stages": 5, "split_k": 5}
    row = {**shape, "kernel": "triton-gemm", **tile, "us": 9.0}
    table = {"triton": version("triton"), "date": "2026-01-31", "commit": "0", "rows": [row]}
    (tmp_path / "h200.json").write_text(json.dumps({"device": "h200", "tables": [table]}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    try:
        found = {each.key() for each in variants.launchable(device_by_name("sm_90"))}
        spec = QuantSpec(WeightType.NF4, 64, torch.bfloat16)
        shape = GemmShape(8, 4096, 4096)
        launch = heuristics.select(shape, spec, device_by_name("h200"))
    finally:
        tuning.forget()
    assert launch.source.startswith("tuned:h200")
    args = (spec, 4096, 0, torch.bfloat16, False)
    assert variants.standing_for(launch.tile, *args).key() in found
    assert variants.standing_for(launch.tile, *args).key() not in unmeasured


def test_of_equal_binaries_one_is_audited() -> None:
    """The dtype of scales tells them apart: it says how their words are read."""
    found = variants.launchable(device_by_name("sm_90"))
    assert len({each.key() for each in found}) == len(found)
    dtypes = {
        each.spec.scale_dtype
        for each in found
        if each.spec.weight_type is WeightType.NF4 and each.act_dtype is torch.bfloat16
    }
    assert len(dtypes) == 3


@pytest.mark.parametrize(
    ("k", "group_size", "phase", "group", "splits", "count"),
    [
        (4096, 128, 0, 128, 1, 1),
        (4096, 256, 0, 256, 2, 2),
        (4096, 1024, 512, 256, 3, 16),
        (4096, 640, 0, 384, 16, 16),
        (4096, 160, 32, 96, 1, 1),
        (4096, 8, 0, 8, 1, 1),
        (4096, 4096, 0, AUDIT_K, 1, 1),
        (2048, 4096, 2048, AUDIT_K, 1, 1),
    ],
)
def test_a_launch_is_audited_as_its_kind(k, group_size, phase, group, splits, count) -> None:
    (tile, *_) = heuristics.tiles_for(device_by_name("sm_90"), WeightType.UINT4, 32)
    spec = QuantSpec(WeightType.UINT4, group_size, torch.float16)
    for name in ("split_k", "segments"):
        launched = replace(tile, **{name: splits})
        found = variants.standing_for(launched, spec, k, phase, torch.bfloat16, True)
        assert found.spec == replace(spec, group_size=group)
        assert found.tile == replace(tile, **{name: count})
