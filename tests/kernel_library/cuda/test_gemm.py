"""The fused kernel in Triton's interpreter (or on a GPU): exact on one-hot tokens, bounded else.

`reference.py` is the oracle: it reads the logical weight, so packing and kernel cannot agree on a
common mistake.
"""

from dataclasses import replace

import pytest
import torch

from fusedq_kernels import ops, reference, testing
from fusedq_kernels.cuda import gemm
from fusedq_kernels.types import Launch, Layout, QuantSpec, WeightType
from gemm_runs import DEVICE, launch, pack, run

pytestmark = pytest.mark.usefixtures("guarded_empty")

PER_CHANNEL = 4096
# Any multiple of 8; those of no more are also entered at odd multiples of 8.
GROUPS_AND_PHASES = [
    *((8, 0), (24, 8), (40, 16), (16, 0), (48, 16), (80, 64), (112, 80)),
    *(
        (group_size, phase)
        for group_size in (32, 64, 96, 128, 256, PER_CHANNEL)
        for phase in (0, 16, 64, 80, 208)
        if phase < group_size
    ),
]
SHAPES = [(8, 272), (72, 400), (136, 144), (72, 528)]
SPLITS = (1, 2, 3)
SCALE_DTYPES = {
    WeightType.UINT4B8: (torch.float16, torch.float32, torch.bfloat16),
    WeightType.UINT4: (torch.float16, torch.bfloat16),
    WeightType.UINT8B128: (torch.float16, torch.float32, torch.bfloat16),
    WeightType.UINT8: (torch.float16, torch.bfloat16),
    WeightType.NF4: (torch.float32, torch.float16),
    WeightType.FP4: (torch.float32, torch.bfloat16),
    WeightType.FLOAT8_E4M3FN: (torch.float32, torch.bfloat16),
    WeightType.FLOAT4_E2M1F: (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float16),
}
# Each group geometry meets one shape, split and scale dtype; the strides are coprime to the cycles.
EXACT_CASES = [
    (
        QuantSpec(weight_type, group_size, dtypes[i % len(dtypes)]),
        phase,
        *SHAPES[(i + i // 4) % len(SHAPES)],
        SPLITS[i % len(SPLITS)],
    )
    for weight_type, dtypes in SCALE_DTYPES.items()
    for i, (group_size, phase) in enumerate(GROUPS_AND_PHASES)
]


def case_id(value) -> str | None:
    if isinstance(value, QuantSpec):
        scale = str(value.scale_dtype).removeprefix("torch.")
        return f"{value.weight_type.value}-g{value.group_size}-{scale}"
    return None


@pytest.mark.parametrize(("spec", "phase", "n", "k", "split_k"), EXACT_CASES, ids=case_id)
def test_one_hot_tokens_return_the_weight_exactly(spec, phase, n, k, split_k):
    logical = testing.random_logical(n, k, spec, phase)
    packed = pack(logical, torch.float16)
    y = run(testing.one_hot(k), packed, None, launch(512, 128, split_k))
    assert torch.equal(y, reference.dequantize(logical, torch.float16).t().to(torch.float16))


@pytest.mark.parametrize("weight_type", WeightType)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_one_hot_is_exact_in_bfloat16(weight_type, group_size):
    spec = QuantSpec(weight_type, group_size, torch.bfloat16)
    logical = testing.random_logical(72, 272, spec, phase=16)
    packed = pack(logical, torch.bfloat16)
    x = testing.one_hot(272, dtype=torch.bfloat16)
    for split_k in (1, 2):
        y = run(x, packed, None, launch(512, 128, split_k))
        assert torch.equal(y, reference.dequantize(logical, torch.bfloat16).t().to(torch.bfloat16))


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
def test_every_code_and_zero_point_is_exact(act_dtype):
    # Output i has zero point i: 17 zero points x 16 codes, the full range a decoder takes.
    spec = QuantSpec(WeightType.UINT4, 128, torch.float16)
    logical = testing.random_logical(24, 128, spec)
    codes = (torch.arange(128) % 16).to(torch.uint8).expand(24, 128).contiguous()
    zeros = torch.arange(24).clamp(max=16).to(torch.uint8)[:, None]
    logical = replace(logical, codes=codes, zeros=zeros, scales=torch.ones(24, 1).half())
    x = testing.one_hot(128, range(16), act_dtype)
    y = run(x, pack(logical, act_dtype), None, launch())
    assert torch.equal(y, (codes[:, :16].int() - zeros.int()).t().to(act_dtype))


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_8_bit_code_is_exact(act_dtype, group_size):
    # Output i holds code i throughout; every place in a K block sees every code.
    spec = QuantSpec(WeightType.UINT8B128, group_size, torch.float16)
    logical = testing.random_logical(256, 256, spec)
    codes = torch.arange(256).to(torch.uint8)[:, None].expand(256, 256).contiguous()
    logical = replace(logical, codes=codes, scales=torch.ones_like(logical.scales))
    x = testing.one_hot(256, dtype=act_dtype)
    y = run(x, pack(logical, act_dtype), None, launch(256, 128))
    assert torch.equal(y, (codes.int() - 128).t().to(act_dtype))


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
def test_every_8_bit_code_and_zero_point_is_exact(act_dtype):
    # Output i has zero point i, feature k holds code k.
    spec = QuantSpec(WeightType.UINT8, 256, torch.float16)
    logical = testing.random_logical(256, 256, spec)
    codes = torch.arange(256).to(torch.uint8).expand(256, 256).contiguous()
    zeros = torch.arange(256).to(torch.uint8)[:, None]
    logical = replace(logical, codes=codes, zeros=zeros, scales=torch.ones(256, 1).half())
    x = testing.one_hot(256, dtype=act_dtype)
    y = run(x, pack(logical, act_dtype), None, launch(256, 128))
    assert torch.equal(y, (codes.int() - zeros.int()).t().to(act_dtype))


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("weight_type", [WeightType.NF4, WeightType.FP4])
def test_every_codebook_entry_is_exact(weight_type, act_dtype, group_size):
    # Output i holds code i throughout: every place in a K block sees every code.
    spec = QuantSpec(weight_type, group_size, torch.float32)
    logical = testing.random_logical(16, 256, spec)
    codes = torch.arange(16).to(torch.uint8)[:, None].expand(16, 256).contiguous()
    logical = replace(logical, codes=codes, scales=torch.ones_like(logical.scales))
    x = testing.one_hot(256, dtype=act_dtype)
    y = run(x, pack(logical, act_dtype), None, launch(256, 64))
    assert torch.equal(y, torch.tensor(weight_type.codebook).to(act_dtype).expand(256, 16))


@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_8_bit_float_is_exact(act_dtype, group_size):
    # Output i holds code i throughout: every place in a K block sees every code.
    spec = QuantSpec(WeightType.FLOAT8_E4M3FN, group_size, torch.float32)
    logical = testing.random_logical(256, 256, spec)
    codes = torch.arange(256).to(torch.uint8)[:, None].expand(256, 256).contiguous()
    logical = replace(logical, codes=codes, scales=torch.ones_like(logical.scales))
    y = run(testing.one_hot(256, dtype=act_dtype), pack(logical, act_dtype), None, launch(256, 128))
    numbers = codes.view(torch.float8_e4m3fn).float()
    known = numbers[:, 0].isfinite()
    assert known.sum() == 254
    assert torch.equal(y[:, known], numbers[known].t().to(act_dtype))


def test_no_tokens():
    logical = testing.random_logical(24, 128, QuantSpec(WeightType.UINT4B8, 128, torch.float16))
    x = torch.zeros(0, 128, dtype=torch.float16)
    assert run(x, pack(logical, x.dtype), None, launch(split_k=2)).shape == (0, 24)


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("n", [8, 72, 136])
@pytest.mark.parametrize("split_k", SPLITS)
@pytest.mark.parametrize("tile", [(8, 128), (16, 64)], ids=["8x128", "16x64"])
def test_tails_in_m_and_n_with_bias(m, n, split_k, tile):
    spec = QuantSpec(WeightType.UINT4, 64, torch.float16)
    k = 400  # four K blocks: a third split is empty
    logical = testing.random_logical(n, k, spec, phase=16)
    rows = [(7 * i) % k for i in range(m)]
    bias = torch.linspace(-1, 1, n).half()
    y = run(testing.one_hot(k, rows), pack(logical, torch.float16), bias, launch(*tile, split_k))
    expected = reference.dequantize(logical)[:, rows].t() + bias.float()
    assert torch.equal(y, expected.to(torch.float16))


@pytest.mark.parametrize("weight_type", WeightType)
@pytest.mark.parametrize("group_size", [32, 128, PER_CHANNEL])
@pytest.mark.parametrize("act_dtype", gemm.ACT_DTYPES)
@pytest.mark.parametrize("split_k", [1, 3])
def test_random_tokens_within_rounding(weight_type, group_size, act_dtype, split_k):
    spec = QuantSpec(weight_type, group_size, torch.float16)
    problem = testing.make_problem(5, 72, 528, spec, phase=16, act_dtype=act_dtype, has_bias=True)
    packed = pack(problem.logical, act_dtype)
    y = run(problem.x, packed, problem.bias, launch(split_k=split_k)).double()
    # fp32 summation of K + bias terms in any order, then one rounding to the output dtype.
    weight = reference.dequantize(problem.logical, act_dtype).double()
    magnitude = problem.x.double().abs() @ weight.abs().t()
    summed = (528 + 8) * 2**-24 * (magnitude + problem.bias.double().abs())
    unit = torch.finfo(act_dtype).eps / 2
    bound = summed + unit * (problem.expected.abs() + summed)
    assert ((y - problem.expected).abs() <= bound).all()


@pytest.mark.parametrize("split_k", SPLITS)
def test_a_row_does_not_depend_on_its_batch(split_k):
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    problem = testing.make_problem(17, 72, 528, spec)
    packed = pack(problem.logical, torch.float16)
    whole = run(problem.x, packed, None, launch(split_k=split_k))
    assert torch.equal(whole, run(problem.x, packed, None, launch(split_k=split_k)))
    for start, stop in ((0, 1), (16, 17), (3, 6)):
        part = run(problem.x[start:stop], packed, None, launch(split_k=split_k))
        assert torch.equal(part, whole[start:stop])


def test_tile_width_does_not_change_the_result():
    spec = QuantSpec(WeightType.UINT4, 32, torch.float16)
    problem = testing.make_problem(9, 136, 400, spec, phase=16)
    packed = pack(problem.logical, torch.float16)
    results = [
        run(problem.x, packed, None, launch(block_m, block_n, split_k=2))
        for block_m, block_n in ((8, 64), (16, 128), (32, 256))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
        lambda x: torch.cat([x, x[:, :8]], 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.t().contiguous().t(),
    ],
    ids=["wide-rows", "misaligned", "odd-stride", "every-second-row", "column-major"],
)
def test_any_strides_and_alignment(view):
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    problem = testing.make_problem(3, 72, 144, spec)
    packed = pack(problem.logical, torch.float16)
    x = problem.x.to(DEVICE)
    expected = ops.run(x, packed, None, launch())
    assert torch.equal(ops.run(view(x), packed, None, launch()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].float()}, "x must be float16 or bfloat16, got float32"),
        (
            lambda a: a | {"x": a["x"][:, :128]},
            r"x must have shape \[\.\.\., 144\], got \[3, 128\]",
        ),
        (lambda a: a | {"x": a["x"][0]}, r"x must have shape \[M, 144\], got \[144\]"),
        (lambda a: a | {"x": a["x"][None]}, r"x must have shape \[M, 144\], got \[1, 3, 144\]"),
        (lambda a: a | {"x": a["x"].to("meta")}, "qweight must be on meta like x"),
        (
            lambda a: a | {"bias": a["bias"].to("meta")},
            "bias must be on (cpu|cuda:0) like x, got meta",
        ),
        (
            lambda a: a | {"bias": a["bias"][:8]},
            r"bias must be torch.float16 \[72\], got torch.float16 \[8\]",
        ),
        (
            lambda a: a | {"bias": a["bias"].float()},
            r"bias must be torch.float16 \[72\], got torch.float32 \[72\]",
        ),
        (
            lambda a: a | {"bias": a["bias"].repeat_interleave(2)[::2]},
            r"bias must be contiguous, got strides \(2,\)",
        ),
        (
            lambda a: a | {"packed": replace(a["packed"], scales=a["packed"].scales.float())},
            "scales must be torch.int32 .*, got torch.float32",
        ),
        (
            lambda a: a | {"packed": replace(a["packed"], zeros=a["packed"].scales)},
            "zeros must be absent, got one",
        ),
        (
            lambda a: a | {"packed": replace(a["packed"], layout=Layout.CPU_WNA16)},
            "triton-gemm reads layout P4, got CPU_WNA16",
        ),
        (
            lambda a: a | {"launch": launch(block_n=256)},
            "block_n 256 does not divide the padded N 128",
        ),
        (
            lambda a: a | {"launch": launch(split_k=0)},
            "split_k or segments must be 1 and none below, got split_k 0 and segments 1",
        ),
        (
            lambda a: a | {"launch": launch(segments=0)},
            "split_k or segments must be 1 and none below, got split_k 1 and segments 0",
        ),
        (
            lambda a: a | {"launch": launch(split_k=2, segments=2)},
            "split_k or segments must be 1 and none below, got split_k 2 and segments 2",
        ),
        (
            lambda a: a | {"launch": Launch("triton-gemm", None, "test")},
            "triton-gemm needs a tile, got none",
        ),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    problem = testing.make_problem(3, 72, 144, spec, has_bias=True)
    arguments = {
        "x": problem.x.to(DEVICE),
        "packed": pack(problem.logical, torch.float16),
        "bias": problem.bias.to(DEVICE),
        "launch": launch(),
    }
    with pytest.raises(ValueError, match=message):
        ops.run(**change(arguments))
