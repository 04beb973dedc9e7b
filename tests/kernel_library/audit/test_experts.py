"""What experts launch is audited, and what the compiler makes of some of it."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusedq_kernels.activation import ACTIVATIONS, SILU, Activation
from fusedq_kernels.audit import everything, experts
from fusedq_kernels.audit.fused import Variant
from fusedq_kernels.call import SCALED_BY_ROWS, SCALES_OF, Call, ExpertsCall
from fusedq_kernels.catalogue import TRITON_GEMM, refusals
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.experts import Load, select
from fusedq_kernels.cuda.routed import Routed
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import TILED_LAYOUTS, Policy, QuantSpec, TileConfig, WeightType

COMPILE_SCRIPT = """
import json
from dataclasses import replace

import torch

from fusedq_kernels.activation import Activation
from fusedq_kernels.audit import experts
from fusedq_kernels.audit.fused import audit_tile
from fusedq_kernels.types import QuantSpec, TileConfig, WeightType

BF16 = torch.bfloat16
int4, ints = WeightType.UINT4B8, WeightType.UINT4
wide = TileConfig(128, 128, 1, 8, 3, scale_weights=True)
gelu = replace(experts.UP, activation=Activation("gelu"))
cases = [
    ("sm_90", TileConfig(8, 64, 1, 2, 4), int4, 128, experts.UP, True),
    ("sm_90", TileConfig(8, 64, 16, 2, 4), int4, 32, experts.UP, False),
    ("sm_90", TileConfig(16, 128, 1, 4, 4), int4, 32, experts.DOWN, False),
    ("sm_90", TileConfig(16, 128, 1, 4, 4), ints, 128, gelu, True),
    ("sm_90", TileConfig(64, 128, 1, 8, 4), int4, 128, experts.UP, False),
    ("sm_90", TileConfig(64, 64, 1, 4, 4), int4, 1 << 16, experts.DOWN, False),
    ("sm_90", TileConfig(64, 128, 1, 8, 4, segments=2), int4, 128, experts.UP, False),
    ("sm_90", wide, int4, 128, experts.UP, False),
    ("sm_90", replace(wide, x_descriptor=True), int4, 128, experts.DOWN, False),
    ("sm_80", TileConfig(16, 64, 2, 4, 4), int4, 32, experts.UP, False),
    ("sm_100", TileConfig(16, 128, 1, 4, 5, scale_steps=True), int4, 128, experts.UP, False),
    ("sm_120", TileConfig(16, 64, 1, 4, 4), int4, 128, experts.DOWN, False),
]
rows = [
    audit_tile(target, tile, QuantSpec(kind, group, BF16), BF16, bias, way)
    for target, tile, kind, group, way, bias in cases
]
print(json.dumps([row.as_json() for row in rows]))
"""

ROUTING_SCRIPT = """
import json

from fusedq_kernels.audit.compile import compile_kernel, disassemble, opcode, target_of
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import routing_kernels as kernels

POINTERS = dict.fromkeys(
    ("ids_ptr", "map_ptr", "counts_ptr", "slots_ptr", "experts_ptr", "perm_ptr"), "*i32"
) | dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), "*bf16") | {"weights_ptr": "*fp32"}
chunk = {"HAS_MAP": True, "CHUNK": 512, "BLOCK_E": 1024}
place = chunk | {"BESIDE": 32, "BLOCK_M": 128}
few = place | {"CHUNK": 64, "BLOCK_M": 8, "COUNTED": False, "counts_ptr": None}
cases = [
    (kernels.count_kernel, 4, chunk),
    (kernels.place_kernel, 16, place | {"COUNTED": True}),
    (kernels.place_kernel, 16, place | {"COUNTED": False, "counts_ptr": None}),
    (kernels.place_kernel, 4, few | {"HAS_MAP": False, "map_ptr": None}),
    (kernels.sum_kernel, 4, {"TOP_K": 10, "HAS_MAP": True, "BLOCK_N": 1024, "INTERPRET": False}),
    (kernels.reorder_kernel, 4, {"TOP_K": 6, "X_SORTED": False, "BLOCK_M": 128, "BLOCK_K": 1024}),
]
found = []
for target in ("sm_80", "sm_90"):
    for kernel, warps, constants in cases:
        gpu = target_of(device_by_name(target))
        compiled = compile_kernel(kernel, gpu, constants, POINTERS, num_warps=warps)
        instructions, seen = disassemble(compiled)
        names = [opcode(text) for _, text in instructions]
        found.append({"name": kernel.fn.__name__, "registers": seen["registers"] * warps * 32,
                      "stack": seen["stack"], "names": names})
print(json.dumps(found))
"""

LAUNCH_SCRIPT = """
import torch
from fusedq_kernels.activation import SILU
from fusedq_kernels.audit import experts
from fusedq_kernels.audit.compile import target_of
from fusedq_kernels.audit.fused import compile_gemm
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.experts import ExpertsLaunch
from fusedq_kernels.cuda.experts import prepare_pass
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.stacked import empty_stacked
from fusedq_kernels.types import Layout, QuantSpec, TileConfig, WeightType

compiled = []
launch = triton.JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

triton.JITFunction.run = compile_only
spec = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
wide = TileConfig(128, 128, 1, 8, 3, scale_weights=True)
down = TileConfig(128, 128, 1, 8, 3, scale_weights=True, x_descriptor=True)
target = target_of(device_by_name("sm_90"))
audited = [
    compile_gemm(target, tile, spec, torch.bfloat16, False, way).asm["cubin"]
    for tile, way in ((wide, experts.UP), (down, experts.DOWN))
]
for count, hidden, inner, tokens in ((4, 256, 256, 3), (130, 1024, 384, 700)):
    sides = [
        Call("triton-gemm", Layout.P4, spec, n, k, 0, k, DType.BFLOAT16)
        for n, k in ((2 * inner, hidden), (hidden, inner))
    ]
    call = ExpertsCall(count, SILU, *sides)
    stacks = []
    for side in sides:
        stack = empty_stacked(Layout.P4, count, side.n, side.k, spec, 0, DType.BFLOAT16, "cpu")
        stacks.append((stack.qweight, stack.scales, None, None, None))
    compiled.clear()
    x, out = (torch.zeros(tokens, hidden, dtype=torch.bfloat16) for _ in range(2))
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    run = prepare_pass(call, ExpertsLaunch(wide, down, "test"), 2)
    run(x, torch.zeros(tokens, 2), ids, None, *stacks, out)
    gemms = [each for each in compiled if each.metadata.name == "fused_gemm_kernel"]
    assert [each.asm["cubin"] for each in gemms] == audited
"""


def test_the_compiler_keeps_to_the_budget(compiling):
    found = json.loads(compiling(COMPILE_SCRIPT))
    assert len(found) == 12
    keys = ("target", "tile", "group_size", "problems")
    assert [[row[key] for key in keys] for row in found if row["problems"]] == []


def test_what_sorts_and_sums_keeps_to_registers_and_wide_loads(compiling):
    found = json.loads(compiling(ROUTING_SCRIPT))
    assert len(found) == 12
    for row in found:
        assert row["stack"] == 0, row["name"]
        assert row["registers"] <= 1 << 16, row["name"]
        # Floating-point sums in any order would have other bits in each run.
        assert not {"RED", "ATOMG"} & {name.split(".")[0] for name in row["names"]}, row["name"]
    for row in (row for row in found if row["name"] == "sum_kernel"):
        loads = [name for name in row["names"] if name.startswith("LDG") and "128" in name]
        assert len(loads) == 10
        assert any(name.startswith("STG") and "128" in name for name in row["names"])


def test_what_is_launched_is_what_is_audited(compiling):
    compiling(LAUNCH_SCRIPT, driver=True)


@cache
def audited(capability: tuple[int, int]) -> frozenset[object]:
    like = next(each for each in KNOWN_DEVICES.values() if each.capability == capability)
    return frozenset(each.key() for each in experts.launchable(like))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(["h200", "a100", "b200"]))
def test_whatever_is_chosen_is_audited(data: st.DataObject, name: str) -> None:
    device = replace(device_by_name(name), name="any", num_sms=data.draw(st.integers(1, 200)))
    count = data.draw(st.sampled_from([8, 60, 128, 384]))
    load = Load(data.draw(st.integers(1, 20000)), data.draw(st.integers(1, 10)), count)
    hidden = 128 * data.draw(st.integers(1, 56))
    inner = 16 * data.draw(st.integers(1, 200))
    group = data.draw(st.sampled_from([32, 64, 128, 1 << 16]) | st.integers(1, 64).map(_eights))
    kind = data.draw(st.sampled_from(WeightType))
    scales = data.draw(st.sampled_from(SCALES_OF[kind]))
    spec = QuantSpec(kind, group, scales, scales in SCALED_BY_ROWS)
    phase = 16 * data.draw(st.integers(0, 8)) % group
    dtype = data.draw(st.sampled_from([DType.FLOAT16, DType.BFLOAT16]))
    policy = Policy(batch_invariant=data.draw(st.booleans()))
    up, down = sizes = ((2 * inner, hidden, 0), (hidden, inner, phase))
    assume(not any(refusals(TRITON_GEMM, n, k, spec, at) for n, k, at in sizes))
    calls = (
        Call("triton-gemm", TILED_LAYOUTS[kind], spec, *size, size[1], dtype, policy)
        for size in sizes
    )
    launch = select(ExpertsCall(count, SILU, *calls), load, device)
    has_bias = data.draw(st.booleans())
    ways = (
        (launch.up, up, Routed(8, y_sorted=True, activation=SILU)),
        (launch.down, down, Routed(1, x_sorted=True)),
    )
    for tile, (_, k, at), routed in ways:
        found = experts.standing_for(tile, spec, k, at, dtype.torch, has_bias, routed)
        assert found.key() in audited(device.capability)


def _eights(number: int) -> int:
    return 8 * number


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 8])
def test_every_other_way_is_audited_as_its_kind(top_k: int) -> None:
    known = {*experts.kinds(), experts.UP, experts.DOWN}
    ways = [
        *(Routed(top_k, y_sorted=True, activation=Activation(n, 2.5)) for n in ACTIVATIONS),
        Routed(top_k, y_sorted=True, activation=Activation("silu", 3.0, 2.0, 0.5)),
        Routed(top_k, y_sorted=True, x_sorted=True, activation=SILU),
        Routed(top_k, y_sorted=True, alone=True, activation=SILU),
        Routed(1, alone=True, x_sorted=True),
    ]
    tile, spec = TileConfig(16, 128, 2, 4, 4), QuantSpec(WeightType.UINT4B8, 128, DType.BFLOAT16)
    for way in ways:
        found = experts.standing_for(tile, spec, 4096, 0, torch.bfloat16, False, way)
        assert found.routed in known


def test_a_name_tells_which_way_it_is() -> None:
    spec, tile = QuantSpec(WeightType.UINT4B8, 128, torch.float16), TileConfig(8, 64, 1, 2, 4)

    def named(routed: Routed) -> str:
        return everything.name_of(Variant(tile, spec, torch.float16, False, routed))

    plain = "uint4b8 fp16 scale=fp16 g128 8x64 w2 s4 k1"
    assert named(Routed()) == plain
    assert named(experts.UP) == f"{plain} up top_k=2 silu"
    assert named(experts.DOWN) == f"{plain} down top_k=1 x_sorted"
    alone = Routed(1, alone=True, y_sorted=True, activation=Activation("silu", 7.0))
    assert named(alone) == f"{plain} up top_k=1 alone silu limit"
