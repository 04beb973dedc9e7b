"""The kernel's variants for many tokens and for batch invariance, judged as the plain one is."""

import pytest
import torch

from fusedq_kernels import geometry, reference, testing
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.cuda import gemm
from fusedq_kernels.types import GemmShape, Policy, QuantSpec, WeightType
from gemm_runs import launch, pack, run

pytestmark = pytest.mark.usefixtures("guarded_empty")

HALF = torch.float16
H200 = device_by_name("h200")
PER_CHANNEL = 4096


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("weight_type", WeightType)
def test_scaled_weights_are_rounded_once(weight_type, group_size, act_dtype):
    # float16 scales under bfloat16 activations: rounding the scale first would round twice.
    logical = testing.random_logical(72, 272, QuantSpec(weight_type, group_size, HALF), phase=0)
    x = testing.one_hot(272, dtype=act_dtype)
    y = run(x, pack(logical, act_dtype), None, launch(512, 128, scale_weights=True))
    assert torch.equal(y, reference.dequantize(logical, act_dtype).t().to(act_dtype))


@pytest.mark.parametrize("options", [{}, {"split_k": 2}, {"segments": 2}])
@pytest.mark.parametrize("group_size", [32, 96])
def test_quarters_of_weights_get_four_times_their_scale(group_size, options):
    spec = QuantSpec(WeightType.UINT4B8, group_size, torch.bfloat16)
    logical = testing.random_logical(72, 288, spec, phase=0)
    tile = launch(512, 128, **options).tile
    groups = geometry.group_geometry(288, group_size, 0)
    constants = gemm.kernel_constants(spec, groups, tile, torch.bfloat16, has_bias=False)
    assert constants["QUARTERS"]
    x = testing.one_hot(288, dtype=torch.bfloat16)
    y = run(x, pack(logical, torch.bfloat16), None, launch(512, 128, **options))
    assert torch.equal(y, reference.dequantize(logical, torch.bfloat16).t().to(torch.bfloat16))


@pytest.mark.parametrize("options", [{"scale_steps": True}, {"scale_steps": True, "segments": 3}])
@pytest.mark.parametrize("weight_type", WeightType)
def test_scaled_steps_add_up_to_the_same(weight_type, options):
    spec = QuantSpec(weight_type, PER_CHANNEL, HALF)
    problem = testing.make_problem(9, 72, 528, spec, phase=0, act_dtype=HALF, has_bias=True)
    packed = pack(problem.logical, HALF)
    y = run(problem.x, packed, problem.bias, launch(**options)).double()
    weight = reference.dequantize(problem.logical, HALF).double()
    magnitude = problem.x.double().abs() @ weight.abs().t() + problem.bias.double().abs()
    # Sums in fp32, each step's rounded once more by its scale, and one rounding of y.
    summed = 2 * (528 + 8) * 2**-24 * magnitude
    unit = torch.finfo(HALF).eps / 2
    assert ((y - problem.expected).abs() <= summed + unit * (problem.expected.abs() + summed)).all()
    one_hot = run(testing.one_hot(528, dtype=HALF), packed, None, launch(512, 128, **options))
    assert torch.equal(one_hot, reference.dequantize(problem.logical, HALF).t().to(HALF))


@pytest.mark.parametrize("scale_dtype", [HALF, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("group_size", "phase"), [(8, 0), (16, 0), (32, 16), (64, 48), (96, 80), (128, 16), (256, 208)]
)
def test_a_row_finds_its_scale_by_itself(group_size, phase, scale_dtype):
    spec = QuantSpec(WeightType.UINT4B8, group_size, scale_dtype)
    logical = testing.random_logical(72, 400, spec, phase)
    y = run(testing.one_hot(400), pack(logical, HALF), None, launch(512, 128, scale_steps=True))
    assert torch.equal(y, reference.dequantize(logical, HALF).t().to(HALF))


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
@pytest.mark.parametrize("scale_dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [WeightType.UINT4, WeightType.UINT8B128, WeightType.NF4])
def test_scaled_weights_stay_within_their_rounding(weight_type, scale_dtype, act_dtype):
    spec = QuantSpec(weight_type, 64, scale_dtype)
    problem = testing.make_problem(9, 72, 528, spec, phase=16, act_dtype=act_dtype, has_bias=True)
    packed = pack(problem.logical, act_dtype)
    y = run(problem.x, packed, problem.bias, launch(scale_weights=True)).double()
    weight = reference.dequantize(problem.logical, act_dtype).double()
    tokens, unit = problem.x.double().abs(), torch.finfo(act_dtype).eps / 2
    # Each weight is rounded to 16 bits: relatively by half an ulp, or absolutely where subnormal.
    subnormal = torch.finfo(act_dtype).smallest_normal * unit
    rounded = tokens @ (unit * weight.abs() + subnormal).t()
    magnitude = tokens @ weight.abs().t() + problem.bias.double().abs() + rounded
    summed = rounded + (528 + 8) * 2**-24 * magnitude
    assert ((y - problem.expected).abs() <= summed + unit * (problem.expected.abs() + summed)).all()
    exact = run(problem.x, packed, problem.bias, launch()).double()
    assert (exact - problem.expected).norm() < (y - problem.expected).norm()


@pytest.mark.parametrize("phase", [0, 16, 80])
@pytest.mark.parametrize("group_size", [32, 128, PER_CHANNEL])
def test_a_tensor_descriptor_loads_the_same_tokens(group_size, phase):
    # Front padding puts the first tile before x, ragged M and K put the last ones beyond it.
    phase %= group_size
    problem = testing.make_problem(
        21, 72, 400, QuantSpec(WeightType.UINT4, group_size, HALF), phase=phase
    )
    packed = pack(problem.logical, HALF)
    expected = run(problem.x, packed, None, launch(split_k=2))
    y = run(problem.x, packed, None, launch(split_k=2, x_descriptor=True))
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("group_size", "parts"), [(16, 5), (64, 2), (64, 9), (PER_CHANNEL, 3)])
def test_segments_add_up_to_the_bits_of_a_split(group_size, parts):
    spec = QuantSpec(WeightType.UINT4, group_size, HALF)
    problem = testing.make_problem(5, 72, 1040, spec, has_bias=True)
    packed = pack(problem.logical, HALF)
    split = run(problem.x, packed, problem.bias, launch(split_k=parts))
    assert torch.equal(run(problem.x, packed, problem.bias, launch(segments=parts)), split)


@pytest.mark.parametrize(
    ("weight_type", "group_size", "act_dtype"),
    [
        (WeightType.UINT4B8, 128, torch.bfloat16),
        (WeightType.UINT4, 32, HALF),
        (WeightType.UINT8, 16, HALF),
        (WeightType.UINT8B128, PER_CHANNEL, HALF),
    ],
)
@pytest.mark.usefixtures("ordered_dot")
def test_batch_invariant_rows_do_not_depend_on_the_batch(weight_type, group_size, act_dtype):
    spec = QuantSpec(weight_type, group_size, HALF)
    problem = testing.make_problem(130, 72, 1152, spec, act_dtype=act_dtype, has_bias=True)
    packed = pack(problem.logical, act_dtype)

    def rows(start, stop, batch_invariant=True):
        shape = GemmShape(stop - start, packed.n, packed.k)
        chosen = select(shape, spec, H200, policy=Policy(batch_invariant))
        assert chosen.tile.split_k * chosen.tile.segments == 3 or not batch_invariant
        return run(problem.x[start:stop], packed, problem.bias, chosen)

    whole = rows(0, 130)
    for start, stop in ((0, 1), (129, 130), (7, 10), (40, 57), (0, 64), (65, 130)):
        assert torch.equal(rows(start, stop), whole[start:stop]), f"{stop - start} tokens"
    if 32 <= group_size < PER_CHANNEL:
        assert not torch.equal(rows(0, 130, batch_invariant=False), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tile shapes meet tensor cores on a GPU")
@pytest.mark.parametrize("weight_type", WeightType)
def test_batch_invariant_rows_on_a_gpu(weight_type):
    spec = QuantSpec(weight_type, 128, torch.float16)
    problem = testing.make_problem(512, 4096, 4096, spec, act_dtype=torch.bfloat16)
    packed = pack(problem.logical, torch.bfloat16)
    results = {}
    for m in (1, 2, 8, 9, 17, 33, 64, 65, 128, 511, 512):
        chosen = select(GemmShape(m, 4096, 4096), spec, H200, policy=Policy(True))
        results[m] = run(problem.x[:m], packed, None, chosen)
    assert all(torch.equal(y, results[512][:m]) for m, y in results.items())
