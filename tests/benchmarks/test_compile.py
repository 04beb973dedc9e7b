"""The benchmarks' own Triton kernels compile for a GPU: the first minute on one is too dear."""

import subprocess
import sys

CODE = """
import sys

import torch
from triton.backends.compiler import GPUTarget

sys.path.insert(0, {benchmarks!r})
from compile_experiments import compiled_variants
from fusedq_kernels.audit import command, fused
from fusedq_kernels.audit.compile import compile_kernel
from fusedq_kernels.types import QuantSpec, WeightType
from gemmbench import ablation, triton_kernels, variants
from gemmbench.experiments import EXPERIMENTS
from vllm_fusedq.measure.undecoded_triton import decoding


def compiled(kernel, pointers, constants, num_warps):
    target = GPUTarget("cuda", 90, 32)
    return compile_kernel(kernel, target, constants, pointers, num_warps=num_warps).asm["ptx"]


for steps, vector in ((1, 1), (4, 4)):
    ptx = compiled(
        triton_kernels._load_only_kernel,
        {{"qweight_ptr": "*i32", "scales_ptr": "*i32", "out_ptr": "*i32"}},
        {{"WORDS": 16, "STEPS": steps, "STEPS_PER_GROUP": 1, "VECTOR": vector, "PAIRED": True,
         "BLOCK_N": 128, "NUM_STAGES": 4}},
        4,
    )
    assert "cp.async.cg.shared.global" in ptx
for tile, warps in ((triton_kernels._SMALL_TILE, 4), (triton_kernels._LARGE_TILE, 8)):
    ptx = compiled(
        triton_kernels._tiled_gemm_kernel,
        {{"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16"}},
        {{"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2],
         "NUM_STAGES": 4, "INTERPRET": False}},
        warps,
    )
    assert "wgmma" in ptx or "mma.sync" in ptx

for weight_type in (WeightType.UINT4B8, WeightType.NF4):
    loops = []
    for decoders in (ablation.WITHOUT, {{}}, ablation.TWICE):
        with decoding(decoders):
            (row,) = command.audit("sm_90", ["8x128"], [weight_type], [torch.bfloat16])
        assert (row.stack, row.sts, row.ldg) == (0, 0, 0), row
        loops.append(row.instructions_per_weight)
    assert loops[0] + 0.5 < loops[1] < loops[2] - 0.5, loops

portable = "16x128 warps 4 stages 4 portable"
tiles = [each for each in EXPERIMENTS[1].variants if each.name == portable]
(found,) = compiled_variants(tiles)
# The budget is that of the assembly.
assert found.line().endswith("wgmma: instructions"), found
# Two programs of one warpgroup fit an SM, and one of two.
prefill = list(compiled_variants(EXPERIMENTS[9].variants[-4::3]))
assert [(each.row.tile.num_warps, each.programs) for each in prefill] == [(4, 2), (8, 1)], prefill
assert all(each.problems == "fine" for each in prefill), prefill
spec = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
loops = []
for decoders in (variants.PORTABLE, {{}}):
    with decoding(decoders):
        loops.append(fused.audit_tile("sm_90", tiles[0].tile, spec, torch.bfloat16))
assert loops[0].alu > loops[1].alu, loops
"""


def test_they_compile_and_the_variants_differ_by_their_dequantization(
    compiler_env: dict[str, str],
) -> None:
    import bench_gemm

    folder = bench_gemm.__file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(benchmarks=folder)],
        capture_output=True,
        text=True,
        env=compiler_env,
    )
    assert done.returncode == 0, done.stderr
