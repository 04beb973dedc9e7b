"""What the compiler makes of the kernel, for several GPUs, without one.

Feeding the tensor cores from registers is a courtesy of Triton's layout propagation, not a
contract: these tests notice the release that withdraws it. The audit runs in subprocesses because
the interpreter replaces the compiler in this one.
"""

import json
import os
import subprocess
import sys

import pytest

from fusedq_kernels.device import device_by_name
from fusedq_kernels.heuristics import tiles_for
from fusedq_kernels.types import WeightType

MMA_KIND = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "mma"),
    **{"sm_90": "wgmma", "sm_100": "tcgen05"},
}
FOUR_BITS = ("--weight-type", "uint4", "uint4b8")
EIGHT_BITS = ("--weight-type", "uint8", "uint8b128")
RUNS = {
    "sm_90": ("--target=sm_90", "--act-dtype", "bf16", "--weight-type", "uint4"),
    "sm_90-fp16": (
        *("--target=sm_90", "--tile", "16x128", "64x256", "--act-dtype", "fp16", *FOUR_BITS),
    ),
    "sm_90-groups": (
        *("--target=sm_90", "--tile", "16x128", "64x128", "--act-dtype", "bf16", *FOUR_BITS),
        *("--group-size", "32", "64", "131072"),
    ),
    "sm_80": (
        *("--target=sm_80", "--tile", "8x128", "32x256", "64x256", "--act-dtype", "bf16"),
        *FOUR_BITS,
    ),
    "sm_100": (
        *("--target=sm_100", "--tile", "16x128", "32x128", "64x256", "--act-dtype", "bf16"),
        *FOUR_BITS,
    ),
    "sm_120": (
        *("--target=sm_120", "--tile", "16x64", "32x256", "64x256", "--act-dtype", "fp16"),
        *FOUR_BITS,
    ),
    "sm_120-groups": (
        *("--target=sm_120", "--tile", "32x256", "--act-dtype", "bf16", *FOUR_BITS),
        *("--group-size", "32", "64"),
    ),
    "sm_90-codebook": (
        *("--target=sm_90", "--tile", "8x128", "64x128", "128x128", "--act-dtype", "bf16"),
        *("--weight-type", "nf4", "fp4", "--group-size", "64", "128"),
    ),
    "sm_120-codebook": (
        *("--target=sm_120", "--tile", "32x256", "64x128", "--act-dtype", "fp16"),
        *("--weight-type", "nf4", "--group-size", "64"),
    ),
    "sm_90-fine": (
        *(
            "--target=sm_90",
            "--act-dtype",
            "bf16",
            "--weight-type",
            "uint4b8",
            "--group-size",
            "48",
        ),
    ),
    "sm_80-finest": (
        *("--target=sm_80", "--tile", "16x128", "--act-dtype", "bf16"),
        *("--weight-type", "uint8", "--group-size", "8"),
    ),
    "sm_100-fine": (
        *("--target=sm_100", "--tile", "16x128", "--act-dtype", "bf16"),
        *("--weight-type", "uint4b8", "--group-size", "16"),
    ),
    "sm_90-invariant": (
        *("--target=sm_90", "--act-dtype", "bf16", "--batch-invariant"),
        *("--weight-type", "uint4", "--group-size", "128", "131072"),
    ),
    "sm_86": ("--target=sm_86", "--tile", "16x128", "--act-dtype", "fp16", *FOUR_BITS),
    "sm_89": ("--target=sm_89", "--tile", "64x128", "--act-dtype", "bf16", *FOUR_BITS),
    "sm_90-8bit": ("--target=sm_90", "--act-dtype", "bf16", "--weight-type", "uint8"),
    "sm_90-8bit-groups": (
        *("--target=sm_90", "--tile", "16x128", "64x128", "--act-dtype", "bf16", *EIGHT_BITS),
        *("--group-size", "32", "131072"),
    ),
    "sm_80-8bit": ("--target=sm_80", "--tile", "32x256", "--act-dtype", "bf16", *EIGHT_BITS),
    "sm_100-8bit": ("--target=sm_100", "--tile", "64x256", "--act-dtype", "bf16", *EIGHT_BITS),
    "sm_120-8bit": (
        *("--target=sm_120", "--tile", "32x256", "64x128", "--act-dtype", "fp16", *EIGHT_BITS),
    ),
}

# SASS instructions per weight and K block that one thread may spend; a step of 32 or 64 rows adds
# a scale and an accumulation per step. HBM of an H200 allows about 4 for up to 16 tokens, and 8
# where a weight has 8 bits.
BUDGET = {
    **{"8x128": 3.3, "8x64": 4.2, "16x128": 3.4, "16x64": 4.2},
    **{"32x256": 3.5, "32x128": 4.4, "32x64": 4.7},
    **{"64x256": 3.8, "64x128": 5.0, "64x64": 5.2, "128x128": 5.7},
    # Scales in another dtype than the activations multiply in fp32.
    **{"64x128s": 6.0, "128x128s": 6.0, "256x128s": 6.0},
}
# What a weight type may spend of it.
SHARE = {"uint4": 1, "uint4b8": 1, "uint8": 1.5, "uint8b128": 1.25, "nf4": 1.6, "fp4": 1.6}

# Launches through the JIT with a driver that names a GPU and never reaches one.
LAUNCH_SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fusedq_kernels import audit, device, gemm, layout, testing
from fusedq_kernels.types import KernelName, Launch, Layout, QuantSpec, TileConfig, WeightType

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

compiled = []
launch = triton.JITFunction.run

def compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

triton.JITFunction.run = compile_only
triton.runtime.driver.set_active(Driver())
tile = TileConfig(16, 128, 1, 4, 4)
spec = QuantSpec(WeightType.UINT4, 128, torch.float16)
for m, n, k, phase in ((1, 256, 1424, 0), (17, 144, 2048, 64), (2048, 4096, 272, 16)):
    packed = layout.pack(testing.random_logical(n, k, spec, phase), Layout.P4, torch.float16)
    x = torch.zeros(m, k, dtype=torch.float16)
    bias = torch.zeros(n, dtype=torch.float16)
    gemm.fused_gemm(x, packed, bias, Launch(KernelName.TRITON_GEMM, tile, "test"))
audited = audit.compile_gemm(device.device_by_name("sm_90"), tile, spec, torch.float16)
assert len(compiled) == 3 and {id(kernel) for kernel in compiled} == {id(compiled[0])}
assert compiled[0].asm["cubin"] == audited.asm["cubin"]
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def rows_of():
    """Rows of each run; all of them compile at the same time."""
    command = (sys.executable, "-m", "fusedq_kernels.audit", "--json")
    processes = {
        name: subprocess.Popen((*command, *arguments), env=environment(), stdout=subprocess.PIPE)
        for name, arguments in RUNS.items()
    }
    rows = {name: json.loads(process.communicate()[0]) for name, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values())
    return rows


def describe(row) -> str:
    tile = row["tile"]
    scaled = "s" if tile["scale_weights"] else ""
    keys = ("target", "weight_type", "act_dtype", "group_size")
    return " ".join(
        [f"{tile['block_m']}x{tile['block_n']}{scaled}", *(str(row[key]) for key in keys)]
    )


def offenders(rows, is_bad):
    return [describe(row) for row in rows if is_bad(row)]


@pytest.mark.parametrize("run", RUNS)
def test_every_tile_fits_the_device(rows_of, run):
    rows = rows_of[run]
    device = device_by_name(rows[0]["target"])
    assert offenders(rows, lambda row: row["stack"] or row["local"]) == []
    assert offenders(rows, lambda row: row["registers"] > 255) == []
    assert offenders(rows, lambda row: row["smem"] > device.smem_per_block) == []
    assert offenders(rows, lambda row: row["tmem"] > 512) == []


@pytest.mark.parametrize("run", RUNS)
def test_main_loop_moves_nothing_by_hand(rows_of, run):
    rows = rows_of[run]
    assert offenders(rows, lambda row: row["loop_instructions"] == 0) == []
    assert offenders(rows, lambda row: row["sts"]) == []
    assert offenders(rows, lambda row: row["ldg"]) == []


@pytest.mark.parametrize("run", RUNS)
def test_tensor_cores_are_used(rows_of, run):
    def is_bad(row):
        # Triton 3.6 compiles 8 tokens to mma.sync everywhere.
        expected = {MMA_KIND[row["target"]]} | ({"mma"} if row["tile"]["block_m"] == 8 else set())
        return row["mma"] not in expected

    assert offenders(rows_of[run], is_bad) == []


@pytest.mark.parametrize("run", ["sm_90", "sm_90-8bit"])
def test_hopper_covers_every_tile(rows_of, run):
    device = device_by_name("sm_90")
    for weight_type in {row["weight_type"] for row in rows_of[run]}:
        tiles = {
            describe(row).split()[0] for row in rows_of[run] if row["weight_type"] == weight_type
        }
        expected = tiles_for(device, WeightType(weight_type), step=128)
        names = {
            f"{tile.block_m}x{tile.block_n}{'s' if tile.scale_weights else ''}" for tile in expected
        }
        assert tiles == names
        assert names <= set(BUDGET)


@pytest.mark.parametrize("run", ["sm_90", "sm_90-fp16", "sm_90-8bit", "sm_90-codebook"])
def test_instructions_per_weight_stay_in_budget(rows_of, run):
    def is_bad(row):
        budget = BUDGET[describe(row).split()[0]] * SHARE[row["weight_type"]]
        return row["instructions_per_weight"] > budget

    assert offenders(rows_of[run], is_bad) == []


def test_one_audited_binary_serves_every_size():
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH_SCRIPT], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
