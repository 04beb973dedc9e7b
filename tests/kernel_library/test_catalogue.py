"""What holds for every kernel by its record: an entry in `KERNELS` is all that a new one needs."""

import os
from dataclasses import replace

import pytest
import torch

from fusedq_kernels import catalogue, ops, reference, testing
from fusedq_kernels.call import Call
from fusedq_kernels.catalogue import KERNELS, Kernel, Op, kernel_for, kernels_for
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts import packing
from fusedq_kernels.record import ChosenBy
from fusedq_kernels.types import (
    DeviceSpec,
    GemmShape,
    Launch,
    Layout,
    PackedWeight,
    Policy,
    QuantSpec,
    TileConfig,
    WeightType,
)

GPU = torch.cuda.is_available()
H200 = device_by_name("h200")
CPU, BARE_CPU = DeviceSpec("cpu", "cpu", cpu_isa="avx2"), DeviceSpec("cpu", "cpu")
DEVICES = (*KNOWN_DEVICES.values(), CPU)
READ = [
    pytest.param(
        kernel, weight_type, layout, id=f"{kernel.name}-{weight_type.value}-{layout.value}"
    )
    for kernel in KERNELS.values()
    for weight_type, layouts in kernel.layouts.items()
    for layout in layouts
]


@pytest.fixture
def ready(request: pytest.FixtureRequest) -> None:
    """Where a kernel needs vLLM's operator, it is registered or the test is skipped."""
    if request.getfixturevalue("kernel").name == "cpu-wna16":
        request.getfixturevalue("wna16_op")


def on_device(packed: PackedWeight, kernel: Kernel) -> PackedWeight:
    device = "cuda" if GPU and kernel.device == "cuda" else "cpu"
    names = ("qweight", "scales", "zeros", "perm")
    tensors = {name: getattr(packed, name) for name in names}
    return replace(
        packed, **{name: each.to(device) for name, each in tensors.items() if each is not None}
    )


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(("kernel", "weight_type", "layout"), READ)
def test_every_kernel_reads_every_weight_exactly(
    kernel: Kernel, weight_type: WeightType, layout: Layout
) -> None:
    """One-hot tokens, and ids, make a result the decoded weight, rounded once."""
    spec = QuantSpec(weight_type, 32, torch.float16)
    phase = 16 if kernel.op is Op.MATMUL else 0
    logical = testing.random_logical(40, 144, spec, phase)
    packed = on_device(packing.pack(logical, layout, torch.float16), kernel)
    device = packed.qweight.device
    weight = reference.dequantize(logical, torch.float16).half()
    if kernel.op is Op.EMBEDDING:
        ids = torch.arange(39, -1, -1, device=device)
        rows = ops.embedding(ids, packed, kernel.name, torch.float16)
        assert torch.equal(rows.cpu(), weight.flip(0))
        return
    y = ops.matmul(testing.one_hot(144).to(device), packed, None, kernel.name)
    assert torch.equal(y.cpu(), weight.t())


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.name)
def test_a_profile_shows_every_kernel_by_the_name_in_its_record(kernel: Kernel) -> None:
    if kernel.device == "cuda" and not (GPU or kernel.chosen_by is ChosenBy.ROWS):
        # In the interpreter there is no kernel to be seen, but there is its name
        module = __import__(kernel.prepared_by.partition(":")[0], fromlist=["_"])
        assert any(kernel.seen_as in name for name in vars(module))
        return
    spec = QuantSpec(WeightType.UINT4, 32, torch.float16)
    logical = testing.random_logical(64, 128, spec)
    layout = kernel.layout(spec.weight_type)
    packed = on_device(packing.pack(logical, layout, torch.float16), kernel)
    x = torch.ones((2, 128), dtype=torch.float16, device=packed.qweight.device)
    with torch.profiler.profile() as found:
        if kernel.op is Op.EMBEDDING:
            ops.embedding(x[:, 0].long(), packed, kernel.name, torch.float16)
        else:
            ops.matmul(x, packed, None, kernel.name)
    assert any(kernel.seen_as in event.name for event in found.events())


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.name)
def test_a_call_has_one_text(kernel: Kernel) -> None:
    for weight_type, layouts in kernel.layouts.items():
        for scale_dtype in ("float16", "bfloat16", "float32"):
            spec = QuantSpec(weight_type, 96, scale_dtype)
            for policy in (Policy(), Policy(True), Policy(True, False), Policy(False, False)):
                call = Call(kernel.name, layouts[0], spec, 40, 144, 16, 144, DType.FLOAT16, policy)
                for each in (call, replace(call, in_features=100), replace(call, phase=0)):
                    assert Call.parse(each.text) == each
    text = "cpu-striped P8 uint8b128 g32 phase 0 float32 [512 x 1056] reading 1024 float16 "
    assert Call.parse(f"{text}batch-invariant unsliced").policy == Policy(True, False)
    assert (Call.parse(text[:-1]).in_features, Call.parse(text[:-1]).k) == (1024, 1056)


def test_a_cpu_gets_its_own_kernels() -> None:
    def names(device, op=Op.MATMUL):
        return [kernel.name for kernel in kernels_for(device, op)]

    assert names(CPU) == ["cpu-fused", "cpu-wna16", "cpu-striped"]
    assert names(BARE_CPU) == ["cpu-wna16", "cpu-striped"]
    assert names(H200) == ["triton-gemm"]
    assert names(CPU, Op.EMBEDDING) == ["cpu-gather"]
    assert names(H200, Op.EMBEDDING) == ["triton-gather"]
    shape, spec = GemmShape(4, 64, 64), QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
    for name, source in (("cpu-fused", "rule: cpu, avx2"), ("cpu-striped", "rule: cpu")):
        assert KERNELS[name].launch(shape, spec, CPU) == Launch(name, None, source)
    for kernel in kernels_for(CPU):
        assert len(kernel.launches(4096, 4096, spec, CPU, 1000)) == 1


@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_nothing_but_its_name_leads_to_a_slow_kernel(weight_type: WeightType) -> None:
    assert kernel_for(CPU, weight_type).name == "cpu-fused"
    with pytest.raises(StopIteration):
        kernel_for(BARE_CPU, weight_type)


@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_every_weight_type_has_kernels_everywhere(weight_type: WeightType) -> None:
    for device in DEVICES:
        held = kernel_for(device, weight_type).layout(weight_type)
        # A tied embedding is looked up in the layout that is multiplied
        assert held in kernel_for(device, weight_type, Op.EMBEDDING).layouts[weight_type]


def test_no_other_kernel_is_known() -> None:
    with pytest.raises(ValueError, match="there is no kernel 'marlin'; known: triton-gemm, "):
        catalogue.kernel_named("marlin")
    with pytest.raises(ValueError, match="kernel cpu-wna16 runs uint4, uint4b8, got nf4"):
        KERNELS["cpu-wna16"].layout(WeightType.NF4)


def test_scratch_is_what_a_call_allocates() -> None:
    shape = GemmShape(64, 4096, 1024)
    gemm, tile = KERNELS["triton-gemm"], TileConfig(64, 128, 4, 8, 4)
    parts = Launch(gemm.name, tile, "test")
    assert gemm.scratch_bytes(parts, shape) == 4 * 4 * 64 * 4096
    whole = Launch(gemm.name, replace(tile, split_k=1, segments=4), "test")
    assert gemm.scratch_bytes(whole, shape) == 0
    none = Launch("", None, "")
    assert KERNELS["sliced-cublas"].scratch_bytes(none, shape) == 2 * 4096 * 1024
    assert KERNELS["cpu-wna16"].scratch_bytes(none, shape) == 0
    threads = (os.cpu_count() or 1) * (3 << 19)
    assert KERNELS["cpu-fused"].scratch_bytes(none, shape) == threads + 4 * 8 * (1024 + 128)
    assert KERNELS["cpu-striped"].scratch_bytes(none, GemmShape(1, 64, 64)) == 4 << 20
    assert KERNELS["cpu-gather"].scratch_bytes(none, GemmShape(2, 9, 128)) == 4 * 2 * 256
