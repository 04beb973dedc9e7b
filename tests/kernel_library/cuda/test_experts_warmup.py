"""Once experts are warm, no number of tokens has a kernel left to compile."""

import pytest
import torch

from expert_layers import COUNT, HIDDEN, Layer
from fusedq_kernels.catalogue import CPU_STRIPED, TRITON_GEMM
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.types import QuantSpec, WeightType

SCRIPT = """
import sys
import torch
from fusedq_kernels.activation import SILU
from fusedq_kernels.call import Call, ExpertsCall
from fusedq_kernels.catalogue import TRITON_GEMM
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda.experts import prepare
from fusedq_kernels.dtype import DType
from fusedq_kernels.experts import ResidentExperts, Stack
from fusedq_kernels.layouts.stacked import empty_stacked
from fusedq_kernels.types import Layout, QuantSpec, WeightType
from fusedq_kernels.warmup import reachable_experts, run_experts_once

is_mapped, ordered = sys.argv[1] == "mapped", sys.argv[2] == "ordered"
compiled = set()
jit = triton.JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    done = jit(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.add((self.fn.__name__, done.hash))

triton.JITFunction.run = compile_only
spec, count, top_k, most = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16), 8, 4, 150
sides = [
    Call("triton-gemm", Layout.P4, spec, n, k, 0, k, DType.BFLOAT16)
    for n, k in ((512, 1024), (1024, 256))
]
call = ExpertsCall(count, SILU, *sides)

def stacks(device):
    made = [
        empty_stacked(Layout.P4, count, of.n, of.k, spec, 0, DType.BFLOAT16, device,
                      ordered=ordered)
        for of in sides
    ]
    return [Stack.of(each) for each in made]

all_experts = 16 if is_mapped else count
gpu = device_by_name("sm_90")
for device in ("meta", "cpu"):
    places = all_experts if is_mapped else None
    resident = ResidentExperts(call, *stacks(device), top_k, places)
    launches = list(reachable_experts(resident, gpu, most))
    for reached in launches:
        run_experts_once(reached, resident)
    if device == "meta":
        before = set(compiled)
assert len(launches) > 4
assert compiled == before, "what is compiled ahead is what runs"
run, own = prepare(call), stacks("cpu")
places = torch.zeros(all_experts, dtype=torch.int32) if is_mapped else None
for tokens in range(1, most + 1):
    x, out = (torch.zeros(tokens, 1024, dtype=torch.bfloat16) for _ in range(2))
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    run(x, torch.zeros(tokens, top_k), ids, places, *own, out)
    assert compiled == before, tokens
names = {name for name, _ in compiled}
assert names >= {"fused_gemm_kernel", "place_kernel", "count_kernel", "sum_kernel"}, names
assert ("reorder_kernel" in names) == ordered
"""


@pytest.mark.parametrize(("mapped", "ordered"), [("whole", "plain"), ("mapped", "ordered")])
def test_nothing_is_compiled_while_serving(compiling, mapped, ordered):
    compiling(SCRIPT, mapped, ordered, driver=True)


def test_a_cpu_has_no_launches():
    layer, gpu = Layer(QuantSpec(WeightType.UINT4B8, 32, torch.float16)), device_by_name("h200")
    assert CPU_STRIPED.expert_launches(layer.call, 2, COUNT, gpu, 40) == ()
    assert CPU_STRIPED.expert_scratch(layer.call, 2, COUNT, gpu, 40) == 0
    assert len(TRITON_GEMM.expert_launches(layer.call, 2, COUNT, gpu, 40)) > 2
    assert TRITON_GEMM.expert_scratch(layer.call, 2, COUNT, gpu, 40) > 2 * 40 * 2 * HIDDEN
