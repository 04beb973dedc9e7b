"""The operator: registration, dispatch, checks and tracing."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedq_kernels as fq
from fusedq_kernels import ops, reference, testing
from fusedq_kernels.catalogue import KERNELS, Op
from fusedq_kernels.types import Policy, QuantSpec, WeightType

HALF = torch.float16
SPEC = QuantSpec(WeightType.UINT4, 32, HALF)
GPU = torch.cuda.is_available()
MATMULS = [each.name for each in KERNELS.values() if each.op is Op.MATMUL]
ON_CPU = [name for name in MATMULS if KERNELS[name].device == "cpu"]


@pytest.fixture(params=MATMULS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu-wna16":
        request.getfixturevalue("wna16_op")
    return request.param


def device_of(kernel: str) -> str:
    return "cuda" if GPU and kernel not in ON_CPU else "cpu"


def make_call(kernel: str, *, m: int = 3, spec: QuantSpec = SPEC, phase: int = 16, **options):
    """A problem, and its weight and bias packed where `kernel` runs."""
    problem = testing.make_problem(m, 40, 96, spec, phase=phase, has_bias=True, **options)
    packed = fq.pack(problem.logical, KERNELS[kernel].layout(spec.weight_type), problem.x.dtype)
    moved = fq.PackedWeight(
        packed.qweight.to(device_of(kernel)),
        packed.scales.to(device_of(kernel)),
        None if packed.zeros is None else packed.zeros.to(device_of(kernel)),
        *(packed.layout, packed.spec, packed.n, packed.k, packed.phase),
    )
    return problem, moved, problem.bias.to(device_of(kernel))


def flat_args(x, packed, bias, kernel: str, changes=None) -> tuple[object, ...]:
    changes = changes or {}
    tensors = {
        "x": x,
        "qweight": packed.qweight,
        "scales": packed.scales,
        "zeros": packed.zeros,
        "bias": bias,
        "perm": packed.perm,
    }
    words = {
        "kernel": kernel,
        "layout": packed.layout.value,
        "weight_type": packed.spec.weight_type.value,
        "scale_dtype": "float16",
        "phase": packed.phase,
        "dtype": "float16",
    }
    words |= {name: value for name, value in changes.items() if name in words}
    tensors |= {name: value for name, value in changes.items() if name in tensors}
    text = "{kernel} {layout} {weight_type} g%d phase {phase} {scale_dtype} [%d x %d]"
    text = text.format(**words) % (packed.spec.group_size, packed.n, packed.k)
    reading = "" if packed.in_features == packed.k else f" reading {packed.in_features}"
    return (*tensors.values(), changes.get("call", f"{text}{reading} {words['dtype']}"))


def assert_right(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Two roundings to fp16, of values and of outputs within 6 RMS of zero."""
    testing.assert_close(y, expected, max_error=12 * 2**-11, rms_error=1.2 * 2**-11)


@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_every_kernel_agrees_with_the_reference(kernel: str, weight_type) -> None:
    if weight_type not in KERNELS[kernel].layouts:
        with pytest.raises(ValueError, match=f"{kernel} runs .*, got {weight_type.value}"):
            KERNELS[kernel].layout(weight_type)
        return
    problem, packed, bias = make_call(kernel, spec=QuantSpec(weight_type, 32, HALF))
    x = problem.x.to(packed.qweight.device)
    assert_right(fq.matmul(x, packed, bias, kernel), problem.expected)
    without = problem.expected - problem.bias.double()
    assert_right(fq.matmul(x, packed, None, kernel), without)


def test_batch_invariant_rows_do_not_depend_on_the_batch() -> None:
    problem, packed, bias = make_call("triton-gemm", m=70)
    x = problem.x.to(packed.qweight.device)
    whole = fq.matmul(x, packed, bias, "triton-gemm", policy=Policy(True))
    assert_right(whole, problem.expected)
    for m in (1, 20):
        part = fq.matmul(x[:m], packed, bias, "triton-gemm", policy=Policy(True))
        assert torch.equal(part, whole[:m])
    assert not torch.equal(fq.matmul(x, packed, bias, "triton-gemm"), whole)


def test_a_kernel_that_is_not_batch_invariant_is_refused() -> None:
    problem, packed, bias = make_call("cpu-striped")
    message = "kernel cpu-striped is not batch-invariant; supported: triton-gemm"
    with pytest.raises(ValueError, match=message):
        fq.matmul(problem.x, packed, bias, "cpu-striped", policy=Policy(True))


def reordered(kernel: str, m: int = 3) -> tuple[torch.Tensor, fq.PackedWeight, torch.Tensor]:
    """Tokens of 70 features, a weight whose 96 rows read them in any order, and the answer."""
    problem, _, _ = make_call(kernel)
    generator = torch.Generator().manual_seed(7)
    perm = torch.randint(0, 70, (96,), generator=generator, dtype=torch.int32)
    logical = replace(problem.logical, perm=perm, in_features=70)
    packed = fq.pack(logical, KERNELS[kernel].layout(logical.spec.weight_type), HALF)
    x = torch.randn((m, 70), generator=generator).half()
    expected = x.double()[:, perm.long()] @ reference.dequantize(problem.logical).double().t()
    device = device_of(kernel)
    moved = {
        name: tensor.to(device)
        for name in ("qweight", "scales", "zeros", "perm")
        if (tensor := getattr(packed, name)) is not None
    }
    return x.to(device), replace(packed, **moved), expected


def test_rows_read_the_features_of_perm(kernel: str) -> None:
    x, packed, expected = reordered(kernel)
    assert_right(fq.matmul(x, packed, None, kernel), expected)
    wide = torch.full((3, 128), torch.nan, dtype=HALF, device=x.device)
    wide[:, 16:86] = x
    y = fq.matmul(x, packed, None, kernel)
    for same in (wide[:, 16:86], x.t().contiguous().t()):
        assert torch.equal(fq.matmul(same, packed, None, kernel), y)
    assert torch.equal(fq.matmul(x.view(3, 1, 70), packed, None, kernel), y.view(3, 1, 40))
    assert fq.matmul(x[:0], packed, None, kernel).shape == (0, 40)
    torch.library.opcheck(torch.ops.fusedq.matmul.default, flat_args(x, packed, None, kernel))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 96).half()}, r"x must have shape \[..., 70\], got \[3, 96\]"),
        ({"perm": torch.zeros(96).long()}, r"perm must be torch.int32 \[96\], got torch.int64"),
        ({"perm": torch.zeros(70).int()}, r"perm must be torch.int32 \[96\], got .* \[70\]"),
        ({"perm": None}, "70 features need a perm to 96 rows"),
    ],
)
def test_wrong_order(changes: dict[str, object], message: str) -> None:
    kernel = "cpu-striped"
    x, packed, _ = reordered(kernel)
    with pytest.raises(ValueError, match=message):
        torch.ops.fusedq.matmul(*flat_args(x, packed, None, kernel, changes))


def test_the_reference_gathers_too() -> None:
    x, packed, expected = reordered("cpu-striped")
    assert torch.equal(reference.matmul(x, fq.unpack(packed)), expected)


def test_shapes_and_strides_of_x(kernel: str) -> None:
    problem, packed, bias = make_call(kernel, m=6)
    x = problem.x.to(packed.qweight.device)
    y = fq.matmul(x, packed, bias, kernel)
    wide = torch.full((6, 128), torch.nan, dtype=HALF, device=x.device)
    wide[:, 16:112] = x
    column_major = x.t().contiguous().t()
    for same in (wide[:, 16:112], column_major, x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(fq.matmul(same, packed, bias, kernel), y)
    assert torch.equal(fq.matmul(x.view(2, 3, 96), packed, bias, kernel), y.view(2, 3, 40))
    transposed = x.view(2, 3, 96).transpose(0, 1)
    assert torch.equal(
        fq.matmul(transposed, packed, bias, kernel), y.view(2, 3, 40).transpose(0, 1)
    )
    assert fq.matmul(x[0], packed, bias, kernel).shape == (40,)


def test_writes_into_the_given_tensor(kernel: str) -> None:
    problem, packed, bias = make_call(kernel, m=6)
    x = problem.x.to(packed.qweight.device)
    y = fq.matmul(x, packed, bias, kernel)
    for shape in ((6, 96), (2, 3, 96), (0, 96), (96,)):
        tokens = x[: 0 if 0 in shape else 6 if len(shape) > 1 else 1].view(shape)
        out = torch.full((*shape[:-1], 40), torch.nan, dtype=HALF, device=x.device)
        where = out.data_ptr()
        assert torch.ops.fusedq.matmul_out(out, *flat_args(tokens, packed, bias, kernel)) is None
        assert out.data_ptr() == where
        assert torch.equal(out, y[: tokens.numel() // 96].view(out.shape))
    out = torch.empty((6, 40), dtype=HALF, device=x.device)
    args = flat_args(x, packed, bias, kernel)
    torch.library.opcheck(torch.ops.fusedq.matmul_out.default, (out, *args))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.ones(3, 39).half(), r"out must be torch.float16 \[3, 40\], got .* \[3, 39\]"),
        (torch.ones(4, 40).half(), r"out must be torch.float16 \[3, 40\], got .* \[4, 40\]"),
        (torch.ones(()).half(), r"out must be torch.float16 \[3, 40\], got .* \[\]"),
        (torch.ones(3, 40), r"out must be torch.float16 .*, got torch.float32"),
        (torch.ones(40, 3).half().t(), r"out must be contiguous, got strides \(1, 3\)"),
        (torch.ones((3, 40), dtype=HALF, device="meta"), "out must be on cpu like x, got meta"),
    ],
)
def test_wrong_output(out: torch.Tensor, message: str) -> None:
    kernel = "cpu-striped"
    problem, packed, bias = make_call(kernel)
    args = flat_args(problem.x, packed, bias, kernel)
    for write in (ops._matmul_out, ops._matmul_out_fake):
        with pytest.raises(ValueError, match=message):
            write(out, *args)


def test_no_tokens(kernel: str) -> None:
    _, packed, bias = make_call(kernel)
    for lead in ((0,), (2, 0), (0, 3)):
        x = torch.empty((*lead, 96), dtype=HALF, device=packed.qweight.device)
        y = fq.matmul(x, packed, bias, kernel)
        assert y.shape == (*lead, 40)
        assert y.dtype == HALF


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(kernel: str, dynamic: bool) -> None:
    problem, packed, bias = make_call(kernel)
    x = problem.x.to(packed.qweight.device)

    _, *weight_and_call = flat_args(x, packed, bias, kernel)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fusedq.matmul(x * 2, *weight_and_call) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:2]), layer(x[:2]))


def test_opcheck(kernel: str) -> None:
    problem, packed, bias = make_call(kernel)
    x = problem.x.to(packed.qweight.device)
    args = flat_args(x, packed, bias, kernel)
    torch.library.opcheck(torch.ops.fusedq.matmul.default, args)


def test_fake_shape_and_checks() -> None:
    kernel = "cpu-striped"
    _, packed, bias = make_call(kernel)
    with FakeTensorMode() as mode:
        args = [
            mode.from_tensor(a) if isinstance(a, torch.Tensor) else a
            for a in flat_args(torch.ones((2, 5, 96)).half(), packed, bias, kernel)
        ]
        y = torch.ops.fusedq.matmul(*args)
        assert y.shape == (2, 5, 40)
        assert y.dtype == HALF
        assert y.is_contiguous()
        with pytest.raises(ValueError, match=r"x must have shape \[..., 96\], got \[2, 95\]"):
            torch.ops.fusedq.matmul(torch.ones((2, 95), dtype=HALF), *args[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 96)}, "x must be torch.float16, got torch.float32"),
        ({"dtype": "float32"}, "x must be float16 or bfloat16, got float32"),
        ({"x": torch.ones(3, 95).half()}, r"x must have shape \[..., 96\], got \[3, 95\]"),
        ({"x": torch.ones(()).half()}, r"x must have shape \[..., 96\], got \[\]"),
        ({"x": torch.ones((3, 96), dtype=HALF, device="meta")}, "must be on meta like x"),
        ({"bias": torch.ones(39).half()}, r"bias must be torch.float16 \[40\], got .* \[39\]"),
        ({"bias": torch.ones(40)}, "bias must be torch.float16 .* got torch.float32"),
        ({"bias": torch.ones(80).half()[::2]}, r"bias must be contiguous, got strides \(2,\)"),
        ({"qweight": torch.ones(2, 128, 16)}, "qweight must be torch.int32"),
        ({"scales": torch.ones(1, 128, 4)}, r"scales must be torch.int32 \[1, 128, 4\]"),
        ({"zeros": torch.ones(4, 16).int()}, "zeros must be absent, got one"),
        ({"phase": 32}, "phase 32 is not inside a group of 32 rows"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of .* got float64"),
        ({"weight_type": "uint8"}, "cpu-striped reads layout P8, got P4"),
        (
            {"weight_type": "uint8", "layout": "P8"},
            r"qweight must be torch.int32 \[1, 128, 32\]",
        ),
        (
            {"weight_type": "uint8", "kernel": "cpu-wna16"},
            "kernel cpu-wna16 runs uint4, uint4b8, got uint8",
        ),
        ({"weight_type": "uint3"}, "'uint3' is not a valid WeightType"),
        ({"kernel": "cublas"}, "there is no kernel 'cublas'; known: triton-gemm, sliced-cublas, c"),
        ({"kernel": "cpu-wna16"}, "cpu-wna16 reads layout CPU_WNA16, got P4"),
        (
            {"call": "cpu-striped P4"},
            "'cpu-striped P4' is no call; one reads 'triton-gemm P4 uint4",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    kernel = "cpu-striped"
    problem, packed, bias = make_call(kernel)
    args = flat_args(problem.x, packed, bias, kernel, changes)
    with pytest.raises(ValueError, match=message):
        torch.ops.fusedq.matmul(*args)


@pytest.mark.parametrize("name", ON_CPU)
def test_cpu_kernels_refuse_a_gpu(name: str) -> None:
    _, packed, bias = make_call(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty((3, 96), dtype=HALF, device="cuda")
        with pytest.raises(ValueError, match=f"kernel {name} runs on a CPU, x is on cuda"):
            ops._matmul_fake(*flat_args(x, packed, bias, name))


def test_missing_zero_points() -> None:
    kernel = "cpu-wna16"
    problem, packed, bias = make_call(kernel)
    with pytest.raises(ValueError, match="zeros must be given, got none"):
        torch.ops.fusedq.matmul(*flat_args(problem.x, packed, bias, kernel, {"zeros": None}))


def test_import_needs_neither_triton_nor_vllm() -> None:
    code = (
        "import sys, importlib, fusedq_kernels, fusedq_kernels.ops as ops\n"
        "assert not {'triton', 'vllm', 'vllm_fusedq'} & set(sys.modules)\n"
        "assert all(hasattr(fusedq_kernels, name) for name in fusedq_kernels.__all__)\n"
        "importlib.reload(ops)\n"
        "import torch; torch.ops.fusedq.matmul.default\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
