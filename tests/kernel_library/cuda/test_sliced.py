"""Sliced prefill: exact weights in every slice, and chosen by declared measured rows alone."""

import pytest
import torch

import fusedq_kernels as fq
from fusedq_kernels import ops, reference, testing
from fusedq_kernels.choose import heuristics, slices
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import sliced
from fusedq_kernels.types import GemmShape, Launch, Policy, QuantSpec, WeightType
from gemm_runs import DEVICE, pack, surrounded_by_nan

SM_90 = device_by_name("sm_90")
SLICED = Launch("sliced-cublas", None, "test")
SPEC = QuantSpec(WeightType.UINT4, 64, torch.float16)
GROUPS_AND_PHASES = [(8, 0), (24, 8), (48, 16), (64, 48), (128, 80), (4096, 0), (4096, 208)]
# The interpreter looks codes up slowly.
CASES = [
    (QuantSpec(weight_type, *group, dtype), phase, dtype)
    for weight_type in WeightType
    for i, (*group, phase) in enumerate(GROUPS_AND_PHASES)
    for dtype in [(torch.float16, torch.bfloat16)[i % 2]]
    if weight_type.codebook is None or group[0] in (48, 64)
]


def case_id(value) -> str | None:
    return (
        f"{value.weight_type.value}-g{value.group_size}" if isinstance(value, QuantSpec) else None
    )


@pytest.fixture
def three_slices(monkeypatch):
    """Slices of 128 outputs of 272 inputs: 328 outputs are two slices and a shorter one."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 2 * 272 * 128)
    assert slices.slice_rows(328, 272) == 128


@pytest.mark.parametrize(("spec", "phase", "dtype"), CASES, ids=case_id)
def test_a_dequantized_slice_is_the_weight_rounded_once(spec, phase, dtype):
    logical = testing.random_logical(72, 272, spec, phase)
    weight = reference.dequantize(logical, dtype).to(dtype)
    packed = pack(logical, dtype)
    for start, stop in ((0, 72), (3, 67)):
        out = torch.full((stop - start + 2, 272), torch.nan, dtype=dtype, device=DEVICE)
        found = sliced.dequantize(packed, out[1:-1], start)
        assert torch.equal(found.cpu(), weight[start:stop])
        assert out[0].isnan().all()
        assert out[-1].isnan().all()


@pytest.mark.usefixtures("guarded_empty", "three_slices")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_slices_meet_in_y(dtype, has_bias):
    problem = testing.make_problem(70, 328, 272, SPEC, phase=16, act_dtype=dtype, has_bias=has_bias)
    packed = pack(problem.logical, dtype)
    bias = torch.nn.Parameter(problem.bias.to(DEVICE)) if has_bias else None
    # Not surrounded by NaN: oneDNN's bf16 kernels multiply what lies beside a row by zero.
    y = ops.run(problem.x.to(DEVICE), packed, bias, SLICED).cpu().double()
    # Weights are rounded, then K products and a bias summed in fp32, y rounded (a CPU rounds the
    # product before it adds the bias).
    magnitude = problem.x.double().abs() @ reference.dequantize(problem.logical).double().abs().t()
    unit = torch.finfo(dtype).eps / 2
    summed = (unit + (272 + 8) * 2**-24) * magnitude
    bound = summed + 2 * unit * (magnitude + problem.expected.abs() + summed)
    assert ((y - problem.expected).abs() <= bound).all()
    testing.assert_close(y, problem.expected, max_error=16 * unit, rms_error=2 * unit)


@pytest.mark.usefixtures("guarded_empty", "three_slices")
def test_one_hot_tokens_return_the_weight_of_every_slice():
    logical = testing.random_logical(328, 272, SPEC, phase=16)
    x = surrounded_by_nan(testing.one_hot(272))
    y = ops.run(x, pack(logical, torch.float16), None, SLICED).cpu()
    assert torch.equal(y, reference.dequantize(logical).t().to(torch.float16))


@pytest.mark.usefixtures("guarded_empty")
@pytest.mark.parametrize("limit", [2 * 272 * 100, 2 * 272, 1])
def test_slices_narrower_than_a_tile(monkeypatch, limit):
    monkeypatch.setattr(slices, "SLICE_BYTES", limit)
    logical = testing.random_logical(24, 272, SPEC)
    x = testing.one_hot(272, [0, 17, 271]).to(DEVICE)
    y = ops.run(x, pack(logical, torch.float16), None, SLICED).cpu()
    assert torch.equal(y, reference.dequantize(logical)[:, [0, 17, 271]].t().to(torch.float16))


def test_no_tokens():
    packed = pack(testing.random_logical(24, 128, SPEC), torch.float16)
    x = torch.zeros(0, 128, dtype=torch.float16, device=DEVICE)
    assert ops.run(x, packed, None, SLICED).shape == (0, 24)


@pytest.mark.parametrize("k", [64, 4096, 14336, 28672, 1 << 18])
@pytest.mark.parametrize("n", [8, 1024, 6528, 28672, 128256])
def test_slices_are_even_and_no_larger_than_allowed(n, k):
    rows = slices.slice_rows(n, k)
    assert slices.workspace_bytes(n, k) == 2 * rows * k <= slices.SLICE_BYTES
    assert rows <= n
    count = -(-n // rows)
    assert rows == n or rows % 128 == 0 or 2 * k * 128 > slices.SLICE_BYTES
    # As few slices as whole tiles allow, none of them nearly empty.
    assert (count - 1) * (slices.SLICE_BYTES // (2 * k) // 128 * 128) <= n
    assert rows * count - n < max(128 * count, rows)


def test_another_layout_is_refused():
    packed = fq.pack(testing.random_logical(32, 128, SPEC), fq.Layout.CPU_WNA16, torch.float16)
    x = torch.zeros(1, 128, dtype=torch.float16)
    with pytest.raises(ValueError, match="sliced-cublas reads layout P4, got CPU_WNA16"):
        ops.run(x, packed, None, SLICED)


def test_only_a_declared_row_leads_there(sliced_rows):
    sliced_rows("uint4", 64, 4096, 4096)
    for m, source in ((64, "row 1"), (65, "row 3"), (128, "row 3"), (129, "rule")):
        shape = GemmShape(m, 4096, 4096)
        declared = heuristics.select(shape, SPEC, SM_90)
        assert source in declared.source
        assert (declared.kernel == "sliced-cublas") is (65 <= m <= 128)
        fused = heuristics.select(shape, SPEC, SM_90, Policy(sliced_prefill=False))
        assert fused.kernel == "triton-gemm"
        assert ("row 2" in fused.source) is (65 <= m <= 128)
        invariant = heuristics.select(shape, SPEC, SM_90, Policy(batch_invariant=True))
        assert invariant.source.endswith("batch-invariant")


def test_what_is_declared_is_what_can_be_reached(sliced_rows):
    assert heuristics.declared_launch(4096, 4096, SPEC, SM_90) is None
    sliced_rows("uint4", 64, 4096, 4096)
    declared = heuristics.declared_launch(4096, 8192, SPEC, SM_90)
    source = "tuned:sm_90 row 3, nearest shape 4096x4096"
    assert declared == (65, Launch("sliced-cublas", None, source))
    assert heuristics.declared_launch(1024, 4096, SPEC, SM_90) is None
    for sliced_prefill, expected in ((True, {65}), (False, set())):
        reached = heuristics.reachable_launches(
            4096, 4096, SPEC, SM_90, 300, Policy(sliced_prefill=sliced_prefill)
        )
        found = {m for m, launch in reached if launch.kernel == "sliced-cublas"}
        assert found == expected


def test_the_operator_slices_where_a_row_says_so_and_its_caller_declared_it(
    sliced_rows, monkeypatch
):
    sliced_rows("uint4", 64, 72, 272)
    ran = []
    real = sliced.prepare
    monkeypatch.setattr(sliced, "prepare", lambda *a: ran.append(a[0].kernel) or real(*a))
    problem = testing.make_problem(70, 72, 272, SPEC, phase=16)
    packed, x = pack(problem.logical, torch.float16), problem.x.to(DEVICE)
    y = fq.matmul(x, packed, None, "triton-gemm")
    assert ran == ["triton-gemm"]
    testing.assert_close(y, problem.expected, max_error=2**-7, rms_error=2**-10)
    for policy in (Policy(sliced_prefill=False), Policy(batch_invariant=True)):
        assert not torch.equal(fq.matmul(x, packed, None, "triton-gemm", policy), y)
    fq.matmul(x[:64], packed, None, "triton-gemm")
    assert ran == ["triton-gemm"]
    assert torch.equal(fq.matmul(x, packed, None, "sliced-cublas"), y)
