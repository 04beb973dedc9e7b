"""What the compiler makes of the kernel, for several GPUs, without one.

Feeding the tensor cores from registers is a courtesy of Triton's layout propagation, not a
contract: these tests notice the release that withdraws it. The audit runs in subprocesses because
the interpreter replaces the compiler in this one.
"""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from fusedq_kernels.audit import command, rows, slices
from fusedq_kernels.audit.compile import count_by_pipe
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import tiles_for
from fusedq_kernels.types import TileConfig, WeightType

# Arguments of the command. Types with stored zero points do all that those without do, and more,
# but for scales of which two share a word.
RUNS = {
    "sm_90": "--target sm_90 --act-dtype bf16 --weight-type uint4",
    "sm_90-8bit": "--target sm_90 --act-dtype bf16 --weight-type uint8",
    "sm_90-fp16": "--target sm_90 --act-dtype fp16 --weight-type uint4 --tile 16x128 64x64",
    "sm_90-groups": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4b8 --tile 8x128 16x128 64x64 64x64s "
        "--group-size 32 64 131072"
    ),
    "sm_90-symmetric": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4b8 "
        "--tile 8x128 16x64 32x128 64x64 64x64s 128x128s 256x128s --scale-dtype fp16"
    ),
    "sm_90-zeros-groups": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4 --tile 8x128 16x128 --group-size 32"
    ),
    "sm_90-8bit-groups": (
        "--target sm_90 --act-dtype bf16 --weight-type uint8b128 --tile 16x128 64x128 "
        "--group-size 32 131072"
    ),
    "sm_90-codebook": (
        "--target sm_90 --act-dtype bf16 --weight-type nf4 --tile 8x128 64x64 128x128 "
        "--group-size 64 128"
    ),
    "sm_90-float": (
        "--target sm_90 --act-dtype bf16 --weight-type float8_e4m3fn --tile 16x128 64x128 "
        "--group-size 128 131072"
    ),
    "sm_90-float4": (
        "--target sm_90 --act-dtype bf16 --weight-type float4_e2m1f --tile 16x128 64x128 "
        "--group-size 16 32"
    ),
    "sm_90-fine": "--target sm_90 --act-dtype bf16 --weight-type uint4b8 --group-size 48",
    "sm_90-no-bias": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4b8 --tile 16x128 64x128s 256x128s "
        "--group-size 64 128 131072 --no-bias"
    ),
    "sm_90-invariant": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4 --batch-invariant "
        "--group-size 128 131072"
    ),
    "sm_90-wide-scales": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4 --tile 128x128s 256x128s "
        "--scale-dtype fp16"
    ),
    "sm_90-split": (
        "--target sm_90 --act-dtype bf16 --weight-type uint4 --tile 8x64 64x64 128x64s --split-k 16"
    ),
    "sm_100-channel": (
        "--target sm_100 --act-dtype bf16 --weight-type uint4 uint8b128 --tile 16x128 64x128 "
        "--group-size 131072"
    ),
    "sm_80": "--target sm_80 --act-dtype bf16 --weight-type uint4 --tile 8x128 32x256 64x256",
    "sm_80-8bit": "--target sm_80 --act-dtype bf16 --weight-type uint8 --tile 32x256",
    "sm_80-finest": (
        "--target sm_80 --act-dtype bf16 --weight-type uint8 --tile 16x128 --group-size 8"
    ),
    "sm_86": "--target sm_86 --act-dtype fp16 --weight-type uint4b8 --tile 16x128",
    "sm_87": "--target sm_87 --act-dtype bf16 --weight-type uint8 --tile 64x128",
    "sm_103": "--target sm_103 --act-dtype bf16 --weight-type uint4 --tile 64x256",
    "sm_110": "--target sm_110 --act-dtype fp16 --weight-type nf4 --tile 16x128",
    "sm_121": "--target sm_121 --act-dtype bf16 --weight-type uint4 --tile 64x256",
    "sm_86-float4": (
        "--target sm_86 --act-dtype bf16 --weight-type float4_e2m1f --tile 16x128 --group-size 16"
    ),
    "sm_86-float": "--target sm_86 --act-dtype bf16 --weight-type float8_e4m3fn --tile 16x128",
    "sm_89": "--target sm_89 --act-dtype bf16 --weight-type uint4 --tile 64x128",
    "sm_100": "--target sm_100 --act-dtype bf16 --weight-type uint4 --tile 16x128 32x128 64x256",
    "sm_100-symmetric": (
        "--target sm_100 --act-dtype bf16 --weight-type uint4b8 --tile 8x128 16x128 --group-size 32"
    ),
    "sm_100-8bit": "--target sm_100 --act-dtype bf16 --weight-type uint8 --tile 64x256",
    "sm_100-fine": (
        "--target sm_100 --act-dtype bf16 --weight-type uint4b8 --tile 16x128 --group-size 16"
    ),
    "sm_120": "--target sm_120 --act-dtype fp16 --weight-type uint4b8 --tile 16x64 32x256 64x256",
    "sm_120-8bit": "--target sm_120 --act-dtype fp16 --weight-type uint8 --tile 32x256 64x128",
    "sm_120-groups": (
        "--target sm_120 --act-dtype bf16 --weight-type uint4 --tile 32x256 --group-size 32 64"
    ),
    "sm_120-codebook": (
        "--target sm_120 --act-dtype fp16 --weight-type nf4 --tile 32x256 64x128 --group-size 64"
    ),
}
WORKERS = 2
WORKER_SCRIPT = """
import json, sys
from fusedq_kernels.audit import command
runs = json.loads(sys.argv[1])
parse = command.arguments().parse_args
rows = {name: command.rows_of(parse(arguments.split())) for name, arguments in runs.items()}
print(json.dumps({name: [row.as_json() for row in rows[name]] for name in runs}))
"""

SLICES_SCRIPT = """
import json
import torch
from fusedq_kernels.audit import slices
from fusedq_kernels.types import WeightType

rows = [
    *slices.audit_slices(
        "sm_90", [WeightType.UINT4, WeightType.UINT8, WeightType.NF4], [torch.bfloat16], [128]
    ),
    *slices.audit_slices("sm_80", [WeightType.UINT4B8], [torch.float16], [8, 48, 1 << 17]),
    *slices.audit_slices("sm_100", [WeightType.UINT8B128], [torch.float16], [32]),
]
print(json.dumps([row.as_json() for row in rows]))
"""

LAUNCH_SCRIPT = """
import torch
from fusedq_kernels import ops, testing
from fusedq_kernels.audit import fused
from fusedq_kernels.audit import slices
from fusedq_kernels.cuda import sliced
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import Launch, Layout, QuantSpec, TileConfig, WeightType

compiled = []
launch = triton.JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

triton.JITFunction.run = compile_only
tile = TileConfig(16, 128, 1, 4, 4)
spec = QuantSpec(WeightType.UINT4, 128, torch.float16)
for m, n, k, phase in ((1, 256, 1424, 0), (17, 144, 2048, 64), (2048, 4096, 272, 16)):
    packed = packing.pack(testing.random_logical(n, k, spec, phase), Layout.P4, torch.float16)
    x = torch.zeros(m, k, dtype=torch.float16)
    bias = torch.zeros(n, dtype=torch.float16)
    ops.run(x, packed, bias, Launch("triton-gemm", tile, "test"))
audited = fused.compile_gemm(GPUTarget("cuda", 90, 32), tile, spec, torch.float16)
assert len(compiled) == 3 and {id(kernel) for kernel in compiled} == {id(compiled[0])}
assert compiled[0].asm["cubin"] == audited.asm["cubin"]
compiled.clear()
sizes = ((256, 1424, 0, 256, 0), (144, 2048, 64, 17, 127), (64, 272, 16, 1, 1))
for n, k, phase, rows, start in sizes:
    packed = packing.pack(testing.random_logical(n, k, spec, phase), Layout.P4, torch.float16)
    sliced.dequantize(packed, torch.zeros(rows, k, dtype=torch.float16), start)
audited = slices.compile_slice("sm_90", spec, torch.float16)
assert len(compiled) == 3 and {id(kernel) for kernel in compiled} == {id(compiled[0])}
assert compiled[0].asm["cubin"] == audited.asm["cubin"]
"""


# One of each decoder, with groups of every kind, for few tokens and for many.
AMD = {
    "mi300x-uint4": ("mi300x", "uint4", 128, 64),
    "mi300x-nf4": ("mi300x", "nf4", 64, 32),
    "mi300x-float4": ("mi300x", "float4_e2m1f", 32, 16),
    "mi300x-finest": ("mi300x", "uint4b8", 8, 16),
    "mi355x-uint8b128": ("mi355x", "uint8b128", 1 << 16, 16),
    "mi355x-float8": ("mi355x", "float8_e4m3fn", 1 << 16, 64),
}
AMD_SCRIPT = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from fusedq_kernels.audit import fused
from fusedq_kernels.audit.compile import audited_groups
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import tiles_for
from fusedq_kernels.types import QuantSpec, WeightType

def compiled(name, weight_type, group_size, tokens):
    spec = QuantSpec(WeightType(weight_type), group_size, torch.float16)
    device = device_by_name(name)
    tiles = tiles_for(device, spec.weight_type, audited_groups(spec).step)
    (tile,) = (each for each in tiles if each.block_m == tokens)
    target = GPUTarget("hip", device.arch, 64)
    kernel = fused.compile_gemm(target, tile, spec, torch.bfloat16)
    kept = {name: kernel.asm[name] for name in ("ttir", "amdgcn")}
    return kept | {"lds": kernel.metadata.shared}

print(json.dumps({name: compiled(*each) for name, each in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def rows_of():
    """Rows of each run."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shares = [list(RUNS.items())[worker::WORKERS] for worker in range(WORKERS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER_SCRIPT, json.dumps(dict(share))],
            env=env,
            stdout=subprocess.PIPE,
        )
        for share in shares
    ]
    rows = {}
    for process in processes:
        rows |= json.loads(process.communicate()[0])
    return rows


def tile_of(row) -> str:
    return rows.tile_name(TileConfig(**row["tile"]))


@pytest.mark.parametrize("run", RUNS)
def test_the_compiler_keeps_to_the_budget(rows_of, run):
    keys = ("target", "weight_type", "act_dtype", "group_size")
    assert rows_of[run]
    assert [
        (tile_of(row), *(row[key] for key in keys), row["problems"])
        for row in rows_of[run]
        if row["problems"]
    ] == []


@pytest.mark.parametrize("run", ["sm_90", "sm_90-8bit"])
def test_hopper_covers_every_tile(rows_of, run):
    (weight_type,) = {row["weight_type"] for row in rows_of[run]}
    tiles = tiles_for(device_by_name("sm_90"), WeightType(weight_type), step=128)
    names = {rows.tile_name(tile) for tile in tiles}
    assert {tile_of(row) for row in rows_of[run]} == names <= set(rows._INSTRUCTIONS)


VARIANT = {"target": "sm_90", "weight_type": "uint4", "act_dtype": "bf16", "group_size": 128}
VARIANT |= {"scale_dtype": "bf16", "hazards": 0}
GOOD = rows.AuditRow(
    **VARIANT,
    **{"registers": 128, "stack": 0, "smem": 42496, "local": 0},
    **{"tile": TileConfig(16, 128, 1, 4, 4), "has_bias": True, "tmem": 0, "mma": "wgmma"},
    **{"loop_instructions": 339, "alu": 110, "fma": 180, "sts": 0, "ldg": 0, "running": 0},
)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, ()),
        ({"stack": 8}, ("spills",)),
        ({"local": 1}, ("spills",)),
        ({"tile": TileConfig(16, 128, 8, 4, 4), "stack": 8}, ()),
        ({"tile": TileConfig(16, 128, 8, 4, 4), "stack": 24}, ("spills",)),
        ({"registers": 256}, ("spills",)),
        ({"smem": 227 * 1024 + 1}, ("shared memory",)),
        ({"target": "sm_80", "mma": "mma", "smem": 163 * 1024 + 1}, ("shared memory",)),
        ({"target": "sm_100", "mma": "tcgen05", "tmem": 576}, ("tensor memory",)),
        ({"loop_instructions": 0}, ("no main loop",)),
        ({"sts": 1, "ldg": 1}, ("stores to shared memory", "loads that are waited for")),
        ({"mma": "mma"}, ("tensor cores",)),
        ({"mma": ""}, ("tensor cores",)),
        ({"target": "sm_100"}, ("tensor cores",)),
        ({"tile": TileConfig(8, 128, 1, 4, 4), "mma": "mma"}, ()),
        ({"hazards": 28}, ("28 registers touched under a running wgmma",)),
        ({"running": 7}, ("wgmma running into the next block",)),
        ({"loop_instructions": 360}, ("instructions",)),
        ({"loop_instructions": 500, "weight_type": "nf4"}, ()),
        ({"loop_instructions": 530, "weight_type": "nf4"}, ("instructions",)),
        ({"loop_instructions": 500, "group_size": 64}, ()),
        ({"loop_instructions": 500, "group_size": 192}, ()),
        ({"loop_instructions": 500, "group_size": 1 << 16}, ("instructions",)),
        ({"loop_instructions": 470, "group_size": 32}, ()),
        ({"loop_instructions": 490, "group_size": 32}, ("instructions",)),
        ({"loop_instructions": 460, "group_size": 32, "weight_type": "uint4b8"}, ("instructions",)),
        ({"weight_type": "float4_e2m1f", "group_size": 16, "loop_instructions": 576}, ()),
        (
            {"weight_type": "float4_e2m1f", "group_size": 16, "loop_instructions": 577},
            ("instructions",),
        ),
        (
            {"weight_type": "uint4b8", "group_size": 32, "loop_instructions": 410},
            ("instructions",),
        ),
    ],
)
def test_every_problem_is_found(changes, problems):
    assert replace(GOOD, **changes).problems == problems


def test_instructions_are_counted_by_their_pipe():
    loop = [
        "LOP3.LUT R1, R2, 0xf000f, R3, 0xea",
        "@!P0 SHF.R.U32.HI R1, RZ, 0x8, R2",
        "HFMA2.BF16_V2 R1, R2, R3, R4",
        "@UP0 UIADD3 UR4, UR5, 0x1, URZ",
        "@P1 HGMMA.64x8x16.F32.BF16 R8, R4, gdesc[UR4], R8, gsb0",
        "IMAD.MOV.U32 R1, RZ, RZ, R2",
    ]
    assert count_by_pipe(loop) == {"alu": 2, "fma": 2}


def test_a_slice_is_dequantized_16_bytes_at_a_time(compiling):
    rows = json.loads(compiling(SLICES_SCRIPT))
    assert len(rows) == 7
    assert [row for row in rows if row["problems"]] == []
    assert {(row["mma"], row["hazards"]) for row in rows} == {("", 0)}
    # Scales of the output's dtype multiply two weights at once: 9.5 without.
    (codebook,) = (row for row in rows if row["weight_type"] == "nf4")
    assert codebook["instructions_per_weight"] < 8


GOOD_SLICE = slices.SliceRow(
    **VARIANT,
    **{"registers": 54, "stack": 0, "smem": 8192, "mma": "", "local": 0},
    **{"instructions": 528, "wide_loads": 2, "wide_stores": 8, "narrow_stores": 0},
)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, ()),
        ({"stack": 8}, ("spills",)),
        ({"local": 1}, ("spills",)),
        ({"smem": 227 * 1024 + 1}, ("shared memory",)),
        ({"wide_loads": 0}, ("narrow loads",)),
        ({"hazards": 4}, ("4 registers touched under a running wgmma",)),
        ({"narrow_stores": 1}, ("narrow stores",)),
        ({"wide_stores": 0}, ("narrow stores",)),
        ({"instructions": 840}, ("instructions",)),
    ],
)
def test_every_problem_of_a_slice_is_found(changes, problems):
    assert replace(GOOD_SLICE, **changes).problems == problems


def test_the_batch_invariant_tile_is_audited_on_every_kind_of_tensor_core(compiling):
    """Also where it is one of the tiles for few tokens as well."""
    script = (
        "import json, torch; from fusedq_kernels.audit import command; "
        "from fusedq_kernels.choose.device import device_by_name; "
        "from fusedq_kernels.types import WeightType; "
        "found = [command._tiles(device_by_name(name), WeightType.NF4, 128, True) "
        "for name in ('sm_80', 'sm_90', 'sm_100')]; "
        "print(json.dumps([[(t.block_m, t.block_n, t.segments) for t in each] for each in found]))"
    )
    assert json.loads(compiling(script)) == [[[32, 128, 4]], [[64, 128, 4]], [[32, 128, 4]]]


def test_both_kinds_of_rows_go_to_one_csv(tmp_path):
    bad = replace(GOOD, ldg=1, sts=2)
    command.write_csv(tmp_path / "audit.csv", [GOOD, bad], [GOOD_SLICE])
    with (tmp_path / "audit.csv").open(newline="") as file:
        good, bad, dequantizing = csv.DictReader(file)
    assert (good["kernel"], good["tile"], good["problems"]) == ("triton-gemm", "16x128", "none")
    assert [good[pipe] for pipe in ("ALU", "FMA", "rest")] == ["110", "180", "49"]
    assert bad["problems"] == "stores to shared memory, loads that are waited for"
    assert (dequantizing["kernel"], dequantizing["tile"]) == ("sliced-cublas", "")
    assert (dequantizing["wide STG"], dequantizing["instr/w"]) == ("8", "8.25")


def test_a_problem_fails_the_command(compiler_env):
    script = (
        "import sys; from fusedq_kernels.audit import command, rows; rows._MAX_REGISTERS = 16; "
        "sys.exit(command.main(sys.argv[1:]))"
    )
    arguments = ("--tile", "8x64", "--weight-type", "uint4b8", "--act-dtype", "bf16")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=compiler_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "problems" in done.stdout.splitlines()[1]
    assert done.stdout.splitlines()[2].endswith("spills")


def test_one_audited_binary_serves_every_size(compiling):
    compiling(LAUNCH_SCRIPT, driver=True)


@pytest.fixture(scope="module")
def amd():
    """What is compiled for AMD GPUs, with waves of 64 threads."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AMD_SCRIPT, json.dumps(AMD)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", AMD)
def test_decoded_weights_reach_the_matrix_cores_of_an_amd_gpu(amd, name):
    assert "inline_asm" not in amd[name]["ttir"]
    assembly = amd[name]["amdgcn"]
    assert re.search(r"v_mfma_f32_\d+x\d+x\d+_bf16", assembly)
    device = device_by_name(AMD[name][0])
    assert f'-{device.arch}"' in assembly
    assert set(re.findall(r"\.wavefront_size:\s*(\d+)", assembly)) == {"64"}
    # Scalar registers may spill to lanes of vector registers: no memory is touched.
    for count in ("vgpr_spill_count", "private_segment_fixed_size"):
        assert set(re.findall(rf"\.{count}:\s*(\d+)", assembly)) == {"0"}
    assert "scratch_" not in assembly
    assert amd[name]["lds"] <= device.smem_per_block
