"""The warp-specialised kernel: by an emulation of its barriers and copies, and what is compiled."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import gluon_emulation
from fusedq_kernels import reference
from fusedq_kernels.geometry import group_geometry
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.testing import random_logical
from fusedq_kernels.types import TILED_LAYOUTS, QuantSpec, WeightType
from gemmbench import specialised
from gluon_emulation import Descriptor, Machine, Pointer, load_kernel

SIZES = specialised.Sizes(32, 5, y_tokens=16)
BF16 = torch.bfloat16

COMPILE_SCRIPT = """
import json
import sys
from types import SimpleNamespace

import torch
import triton

sys.path.insert(0, sys.argv[1])
from fusedq_kernels.audit.compile import disassemble, opcode
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.testing import random_logical
from fusedq_kernels.types import TILED_LAYOUTS, QuantSpec, WeightType
from gemmbench import specialised

launched = []
launch = triton.JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    launched.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

triton.JITFunction.run = compile_only
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
cases = [
    (WeightType.UINT4B8, 128, torch.bfloat16, specialised.WIDE, True),
    (WeightType.UINT4, 1 << 16, torch.float16, specialised.NARROW, False),
]
found = []
for weight_type, group, dtype, sizes, bias in cases:
    spec = QuantSpec(weight_type, group, dtype)
    packed = pack(random_logical(256, 512, spec, 0), TILED_LAYOUTS[weight_type], dtype)
    x, row = torch.zeros(300, 512, dtype=dtype), torch.zeros(257, dtype=dtype)
    specialised.prepare(packed, sizes)(x, row[1:] if bias else None)
    kernel = specialised.compiled(spec, sizes, dtype, bias)
    instructions, seen = disassemble(kernel)
    names = [opcode(text) for _, text in instructions]
    groups = [text for _, text in instructions if "HGMMA" in text and "gsb0" in text]
    found.append({
        **seen, "products": sum(name.startswith("HGMMA") for name in names), "groups": len(groups),
        "local": sum(name.startswith(("LDL", "STL")) for name in names),
        "launched": launched[-1].asm["cubin"] == kernel.asm["cubin"],
    })
print(json.dumps(found))
"""


def packed_weight(weight_type: WeightType, n: int, k: int, group: int, phase: int, dtype):
    logical = random_logical(n, k, QuantSpec(weight_type, group, dtype), phase)
    return logical, pack(logical, TILED_LAYOUTS[weight_type], dtype)


def _same(machine: Machine) -> Machine:
    return machine


def emulated(packed, x, bias, programs: int = 3, change=str) -> torch.Tensor:
    """What the kernel stores, each program on its own; `change` is applied to its text."""
    spec, groups = packed.spec, group_geometry(packed.k, packed.spec.group_size, packed.phase)
    num_blocks, n_padded, width = packed.qweight.shape
    y = torch.full((x.shape[0], packed.n), float("nan"), dtype=x.dtype)
    tensors = (x, packed.qweight.view(-1, width), y)
    described = {
        name: Descriptor(tensor, block)
        for tensor, (name, (_, block, _)) in zip(
            tensors, specialised.blocks(SIZES, x.dtype).items(), strict=True
        )
    }
    own = specialised.constants(spec, groups, SIZES, x.dtype, bias is not None) | {"GROUP": 2}
    for program in range(programs):
        machine = Machine(program, programs)
        module = load_kernel("gemmbench.specialised_kernel", partial(_same, machine), change)
        module.specialised_kernel(
            **described,
            scales_ptr=Pointer(packed.scales.flatten()),
            bias_ptr=None if bias is None else Pointer(bias),
            N=packed.n,
            n_padded=n_padded,
            first_step=groups.first_step,
            num_blocks=num_blocks,
            tiles_m=-(-x.shape[0] // SIZES.block_m),
            tiles_n=n_padded // 128,
            **own,
        )
    return y


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    ("weight_type", "n", "k", "group", "phase"),
    [
        (WeightType.UINT4B8, 200, 512, 128, 0),
        (WeightType.UINT4, 136, 304, 128, 0),
        (WeightType.UINT4B8, 64, 384, 256, 128),
        (WeightType.UINT4, 256, 256, 256, 0),
        (WeightType.UINT4B8, 128, 128, 1024, 0),
    ],
)
def test_it_computes_what_the_weights_mean(weight_type, n, k, group, phase, dtype) -> None:
    logical, packed = packed_weight(weight_type, n, k, group, phase, dtype)
    assert not specialised.unsupported(packed.spec, k, phase, dtype)
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(70, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if n % 16 else None
    y = emulated(packed, x, bias)
    weight = reference.dequantize(logical, torch.float64).to(dtype).double()
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    bound = 2 ** (-8 if dtype is BF16 else -11) * exact.abs() + 1e-5 * x.abs().double().sum(1, True)
    wrong = ~((y.double() - exact).abs() <= bound)
    assert not wrong.any(), wrong.nonzero()


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("deps=[acc, low])", "deps=[acc, low]) if block else (acc, low)"),
        ("mbarrier.init(x_empty.index(i), count=2)", "mbarrier.init(x_empty.index(i), count=1)"),
        (
            "mbarrier.init(words_full.index(i), count=1)",
            "mbarrier.init(words_full.index(i), count=2)",
        ),
        ("mbarrier.wait(x_full.index(second), x_phase)", "pass"),
        ("mbarrier.wait(x_empty.index(x_stage), x_phase)", "pass"),
        ("mbarrier.arrive(x_empty.index(second), count=1)", "pass"),
        ("gl.where(last, phase ^ 1, phase)", "phase"),
        ("row = block * n_padded + tile_n * _BLOCK_N", "row = block * n_padded"),
        ("metadata = following", "pass"),
    ],
)
def test_the_emulation_sees_a_fault(monkeypatch, text: str, changed: str) -> None:
    monkeypatch.setattr(gluon_emulation, "PATIENCE", 0.5)
    logical, packed = packed_weight(WeightType.UINT4B8, 256, 640, 128, 0, BF16)
    x = torch.randn(70, 640, generator=torch.Generator().manual_seed(0)).to(BF16)

    def change(source: str) -> str:
        assert source.count(text) == 1
        return source.replace(text, changed)

    exact = x.double() @ reference.dequantize(logical, torch.float64).to(BF16).double().T
    try:
        y = emulated(packed, x, None, programs=1, change=change)
    except (TimeoutError, RuntimeError, TypeError):
        return
    assert not torch.allclose(y.double(), exact, rtol=1e-2, atol=1e-2)


def test_what_it_does_not_multiply_by_is_said() -> None:
    spec = QuantSpec(WeightType.UINT4B8, 128, BF16)
    assert specialised.unsupported(replace(spec, group_size=32), 512, 0, BF16).startswith("groups")
    assert specialised.unsupported(spec, 512, 64, BF16).startswith("groups of 128 from phase 64")
    assert "scales in bfloat16" in specialised.unsupported(spec, 512, 0, torch.float16)
    nf4 = QuantSpec(WeightType.NF4, 128, torch.float32)
    assert specialised.unsupported(nf4, 512, 0, BF16) == "no nf4"


def test_products_run_beside_decoding_and_nothing_spills(compiling) -> None:
    folder = specialised.__file__.rpartition("/gemmbench")[0]
    for row in json.loads(compiling(COMPILE_SCRIPT, folder, driver=True)):
        assert row["launched"], "what is launched is not what is compiled"
        assert (row["stack"], row["local"], row["hazards"]) == (0, 0, 0), row
        # Two consumers multiply twice a block, four times each; products that ptxas runs one by
        # one would each end a group.
        assert (row["products"], row["groups"]) == (16, 4), row
        assert row["smem"] <= 232448, row
