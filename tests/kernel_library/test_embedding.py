"""The gather: rows equal the reference's, rounded once, bit for bit, in every layout.

`reference.py` reads the logical weight and shares no code with the packed layouts or the gathers.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedq_kernels import reference, testing
from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS
from fusedq_kernels.cpu import gather as cpu_gather
from fusedq_kernels.layouts import packing
from fusedq_kernels.ops import embedding
from fusedq_kernels.prepared import prepared
from fusedq_kernels.types import Layout, QuantSpec, WeightType, holds

GPU = torch.cuda.is_available()
BOTH = ("cpu-gather", "triton-gather")
# Rows that repeat, neighbours in a word, the first and the last, and two that are none.
N = 70
IDS = torch.tensor([0, 1, 15, 16, 17, 33, 33, 69, -1, 70, 8])
DTYPES = (torch.float16, torch.bfloat16)
GROUPS = (8, 24, 32, 128, 256, 4096)


def device_of(gather: str) -> str:
    return "cuda" if GPU and gather == "triton-gather" else "cpu"


def problem(weight_type: WeightType, group_size: int, k: int, dtype: torch.dtype, seed: int = 0):
    """A logical weight with scales of 16 bits and the rows that IDS ask for."""
    scale_dtype = DTYPES[seed % 2]
    logical = testing.random_logical(N, k, QuantSpec(weight_type, group_size, scale_dtype), 0, seed)
    return logical, rows_of(logical, dtype)


def rows_of(logical, dtype: torch.dtype, ids: torch.Tensor = IDS) -> torch.Tensor:
    known = ((ids >= 0) & (ids < N))[:, None]
    rows = reference.dequantize(logical, dtype)[ids.clamp(0, N - 1)]
    return (rows * known).to(dtype)


def run(ids, packed, gather: str, dtype: torch.dtype) -> torch.Tensor:
    tensors = {
        name: None if tensor is None else tensor.to(device_of(gather))
        for name in ("qweight", "scales", "zeros", "perm")
        for tensor in [getattr(packed, name)]
    }
    return embedding(ids.to(device_of(gather)), replace(packed, **tensors), gather, dtype).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", BOTH, ids=lambda gather: gather)
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_rows_of_a_tiled_layout_are_exact(weight_type, gather, dtype) -> None:
    groups = GROUPS
    if gather == "triton-gather" and not GPU:
        # The interpreter is slow, most of all at looking codes up: each dtype meets other steps
        groups = GROUPS if weight_type.codebook is None else (24, 128)
        groups = groups[DTYPES.index(dtype) :: 2]
    for seed, group_size in enumerate(groups):
        k = (144, 272)[seed % 2] if weight_type.codebook is None else 136
        logical, expected = problem(weight_type, group_size, k, dtype, seed)
        packed = packing.pack(logical, KERNELS[gather].layout(weight_type), dtype)
        assert torch.equal(run(IDS, packed, gather, dtype), expected), group_size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_type", [WeightType.UINT4, WeightType.UINT4B8], ids=str)
def test_rows_of_the_cpu_operator_s_layout_are_exact(weight_type, dtype) -> None:
    for seed, group_size in enumerate(GROUPS):
        logical, _ = problem(weight_type, group_size, 272, dtype, seed)
        packed = packing.pack(logical, Layout.CPU_WNA16, dtype)
        # The operator demands scales in the dtype of the activations
        rounded = replace(logical, scales=logical.scales.to(dtype))
        expected = rows_of(rounded, dtype)
        assert torch.equal(run(IDS, packed, "cpu-gather", dtype), expected), group_size


@pytest.mark.parametrize("gather", BOTH, ids=lambda gather: gather)
def test_wide_scales_are_not_rounded(gather) -> None:
    spec = QuantSpec(WeightType.UINT8B128, 32, torch.float32)
    logical = testing.random_logical(N, 96, spec)
    packed = packing.pack(logical, Layout.P8, torch.float16)
    assert torch.equal(run(IDS, packed, gather, torch.float16), rows_of(logical, torch.float16))


@pytest.mark.parametrize("gather", BOTH, ids=lambda gather: gather)
def test_reordered_columns_go_back_to_their_places(gather) -> None:
    logical = testing.random_logical(N, 272, QuantSpec(WeightType.UINT4, 16, torch.float16))
    perm = torch.randperm(272, generator=torch.Generator().manual_seed(3)).int()
    packed = packing.pack(replace(logical, perm=perm, in_features=272), Layout.P4, torch.float16)
    expected = torch.empty(len(IDS), 272, dtype=torch.float16)
    expected[:, perm.long()] = rows_of(logical, torch.float16)
    assert torch.equal(run(IDS, packed, gather, torch.float16), expected)


@pytest.mark.parametrize("gather", BOTH, ids=lambda gather: gather)
@pytest.mark.parametrize("shape", [(), (11,), (2, 3), (0,), (0, 4)], ids=str)
def test_ids_of_any_shape_and_both_integer_types(shape, gather) -> None:
    logical, _ = problem(WeightType.UINT4B8, 32, 64, torch.float16)
    packed = packing.pack(logical, Layout.P4, torch.float16)
    count = int(torch.tensor(shape).prod()) if shape else 1
    ids = (torch.arange(count) * 13 % N).view(shape)
    expected = rows_of(logical, torch.float16, ids.flatten()).view(*shape, 64)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(run(ids.to(dtype), packed, gather, torch.float16), expected)


def test_many_rows_are_dequantized_a_few_at_a_time(monkeypatch) -> None:
    prepared.cache_clear()
    monkeypatch.setattr(cpu_gather, "STRIPE_VALUES", 200)
    logical, expected = problem(WeightType.UINT4, 32, 64, torch.float16)
    packed = packing.pack(logical, Layout.P4, torch.float16)
    assert torch.equal(run(IDS, packed, "cpu-gather", torch.float16), expected)


@pytest.mark.parametrize("form", [form for form in Layout if holds(form, WeightType.UINT4)])
def test_the_cpu_reads_no_other_row(form) -> None:
    logical, _ = problem(WeightType.UINT4, 32, 4096, torch.float16)
    packed = packing.pack(logical, form, torch.float16)
    with torch.profiler.profile(profile_memory=True) as found:
        embedding(torch.tensor([5]), packed, "cpu-gather", torch.float16)
    largest = max(event.self_cpu_memory_usage for event in found.events())
    # A row in fp32, where the codes alone of the whole weight would be 70 times 4096 bytes
    assert 4096 <= largest <= 8 * 4096


def call(changes: dict[str, object]) -> torch.Tensor:
    logical, _ = problem(WeightType.UINT4, 32, 64, torch.float16)
    packed = packing.pack(logical, Layout.P4, torch.float16)
    words = {"kernel": "cpu-gather", "layout": "P4", "k": 64, "scales": "float16", "x": "float16"}
    words |= {name: value for name, value in changes.items() if name in words}
    tensors = {
        "ids": torch.tensor([1, 2]),
        "qweight": packed.qweight,
        "scales": packed.scales,
        "zeros": None,
        "perm": None,
    }
    tensors |= {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    text = "{kernel} {layout} uint4 g32 phase 0 {scales} [70 x {k}] {x}".format(**words)
    return torch.ops.fusedq.embedding(*tensors.values(), text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(2)}, "ids must be int64 or int32, got torch.float32"),
        ({"x": "float32"}, "x must be float16 or bfloat16, got float32"),
        ({"scales": "int8"}, "scale_dtype must be one of .*, got int8"),
        ({"k": 192}, r"qweight must be torch.int32 \[2, 128, 16\]"),
        ({"zeros": torch.zeros(1)}, "zeros must be absent, got one"),
        ({"perm": torch.zeros(3).int()}, r"perm must be torch.int32 \[64\]"),
        (
            {"layout": "CPU_WNA16", "kernel": "triton-gather"},
            "triton-gather reads layout P4, got CPU_WNA16",
        ),
        ({"layout": "P8"}, "cpu-gather reads layout P4, CPU_WNA16, got P8"),
    ],
)
def test_wrong_arguments_are_refused(changes, message) -> None:
    call({})
    with pytest.raises(ValueError, match=message):
        call(changes)


def test_a_weight_that_starts_inside_a_group_is_refused() -> None:
    spec = QuantSpec(WeightType.UINT4, 32, torch.float16)
    packed = packing.pack(testing.random_logical(8, 64, spec, phase=16), Layout.P4, torch.float16)
    with pytest.raises(ValueError, match="an embedding starts with whole groups, got phase 16"):
        embedding(torch.tensor([0]), packed, "cpu-gather", torch.float16)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_the_cpu_gather_refuses_a_gpu() -> None:
    with pytest.raises(ValueError, match="kernel cpu-gather runs on a CPU, x is on cuda"):
        call({"ids": torch.tensor([1], device="cuda")})


def test_traces_without_running() -> None:
    logical, _ = problem(WeightType.UINT4, 32, 64, torch.float16)
    packed = packing.pack(logical, Layout.P4, torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(torch.zeros((2, 3), dtype=torch.int64))
        rows = embedding(ids, packed, "cpu-gather", torch.bfloat16)
    assert (tuple(rows.shape), rows.dtype) == ((2, 3, 64), torch.bfloat16)
    text = Call.of(packed, "cpu-gather", torch.float16).text
    args = (IDS, packed.qweight, packed.scales, None, None, text)
    torch.library.opcheck(torch.ops.fusedq.embedding.default, args)


def test_the_operator_needs_no_triton() -> None:
    code = "import fusedq_kernels.ops, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
