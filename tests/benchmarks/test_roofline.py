"""The static roofline against numbers worked out by hand, its instruction count against SASS."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.types import DeviceSpec, GemmShape, QuantSpec, TileConfig, WeightType
from vllm_fusedq.measure.roofline import Rates, instructions_per_weight, rates_for, roofline

INT4 = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
# 4 SMs of 1 GHz: 409.6e9 thread instructions a second at 80 % of 128 lanes.
TOY = DeviceSpec("toy", "cuda", (9, 0), num_sms=4, smem_per_block=64 * 1024)
TOY_RATES = Rates(hbm=1e9, l2=4e9, tensor=1e12, clock=1e9)


def test_bytes_and_times_of_a_small_problem() -> None:
    tile = TileConfig(block_m=16, block_n=64, split_k=1, num_warps=4, num_stages=3)
    found = roofline(GemmShape(16, 256, 512), INT4, TOY, tile, TOY_RATES)
    # 256 x 512 codes of half a byte and 4 groups x 256 scales of 2 bytes.
    assert found.weight_bytes == 65536 + 2048
    # x is 16 x 512, y 16 x 256, 2 bytes each.
    assert found.dram_bytes == 67584 + 16384 + 8192
    # Each of the 4 tiles of outputs reads x again.
    assert found.l2_bytes == 67584 + 4 * 16384 + 8192
    assert found.flops == 2 * 16 * 256 * 512
    assert (found.programs, found.waves, found.imbalance) == (4, 1.0, 1.0)
    # A thread decodes 64 weights and holds 8 accumulators: 120 + 8 + 1.55 * 64 instructions.
    assert found.instructions == pytest.approx(256 * 512 * 227.2 / 64)
    assert found.dram_s == pytest.approx(92160e-9)
    assert found.l2_s == pytest.approx(141312 / 4e9)
    assert found.issue_s == pytest.approx(256 * 512 * 3.55 / 409.6e9)
    assert found.tensor_s == pytest.approx(2 * 16 * 256 * 512 / 1e12)
    assert found.limiter == "dram"
    assert found.seconds == pytest.approx(92160e-9 + 1.5e-6)


def test_split_k_pays_for_its_partials_and_last_pass() -> None:
    tile = TileConfig(block_m=16, block_n=64, split_k=2, num_warps=4, num_stages=3)
    found = roofline(GemmShape(16, 256, 512), INT4, TOY, tile, TOY_RATES)
    assert found.programs == 8
    assert found.l2_bytes == 141312 + 2 * 2 * 16 * 256 * 4
    assert found.fixed_s == pytest.approx(2.8e-6)


def test_padding_and_the_busiest_sm_count() -> None:
    # N pads from 320 to 384: 6 tiles on 4 SMs, so one SM does 2 of a mean of 1.5.
    tile = TileConfig(block_m=16, block_n=64, split_k=1, num_warps=4, num_stages=3)
    found = roofline(GemmShape(1, 320, 512), INT4, TOY, tile, TOY_RATES)
    assert found.weight_bytes == 384 * 512 // 2 + 4 * 384 * 2
    assert found.imbalance == pytest.approx(2 / 1.5)
    assert found.dram_s == pytest.approx(
        (found.weight_bytes + 2 * (512 + 320)) / 1e9 * (1 + 4 / 3) / 2
    )
    assert found.tensor_s == pytest.approx(2 * 16 * 384 * 512 / 1e12 * 4 / 3)


def test_too_few_programs_cannot_keep_hbm_busy() -> None:
    rates = Rates(hbm=1e15, l2=1e18, tensor=1e18, clock=1e12)
    tile = TileConfig(block_m=16, block_n=128, split_k=1, num_warps=4, num_stages=3)
    found = roofline(GemmShape(1, 128, 512), INT4, TOY, tile, rates)
    # One program keeps two of its three stages of 8192 bytes in flight for 0.9 us; 3 SMs idle.
    assert found.imbalance == 4
    assert found.dram_s == pytest.approx(found.dram_bytes / (16384 / 0.9e-6) * 2.5)


def test_scales_take_their_part_of_a_programs_shared_memory() -> None:
    rates = Rates(hbm=1e15, l2=1e18, tensor=1e18, clock=1e12)
    tile = TileConfig(block_m=16, block_n=64, split_k=1, num_warps=4, num_stages=3)
    # A stage: 4096 bytes of codes, 4096 of x, 128 of scales with groups of 128, 512 with 32.
    device = replace(TOY, smem_per_block=2 * (3 * (8192 + 128) + 1024))
    in_flight = []
    for group_size in (128, 32):
        spec = replace(INT4, group_size=group_size)
        found = roofline(GemmShape(1, 512, 512), spec, device, tile, rates)
        in_flight.append(found.dram_bytes / found.dram_s * 0.9e-6)
    # Two of three stages on each of 4 SMs: two programs an SM, or one.
    assert in_flight == pytest.approx([4 * 2 * 2 * 4096, 4 * 1 * 2 * 4096])


def test_prefill_reads_the_weight_once_per_tile_of_tokens() -> None:
    tile = TileConfig(block_m=128, block_n=128, split_k=1, num_warps=8, num_stages=3)
    found = roofline(GemmShape(512, 256, 512), INT4, TOY, tile, TOY_RATES)
    assert found.l2_bytes == 4 * 67584 + 2 * 512 * (512 * 2 + 256)
    assert found.dram_bytes == 67584 + 2 * 512 * (512 + 256)
    assert found.instructions == pytest.approx(4 * 256 * 512 * (120 + 64 + 1.55 * 64) / 64)


def test_scales_cost_by_group_by_weight_or_nothing() -> None:
    tile = TileConfig(block_m=16, block_n=128, split_k=1, num_warps=4, num_stages=4)
    grouped = QuantSpec(WeightType.UINT4B8, 32, torch.float16)
    per_channel = QuantSpec(WeightType.UINT4B8, 512, torch.float16)
    assert instructions_per_weight(grouped, tile, 512) == pytest.approx((120 + 64) / 128 + 1.55)
    assert instructions_per_weight(per_channel, tile, 512) == pytest.approx(120 / 128 + 1.55)
    scaled = replace(tile, scale_weights=True)
    assert instructions_per_weight(grouped, scaled, 512) == pytest.approx(120 / 128 + 2.05)


def test_rates_are_known_where_a_sheet_says_them() -> None:
    kinds = {device.capability[0] for device in KNOWN_DEVICES.values() if rates_for(device)}
    assert kinds == {8, 9, 10, 12}
    assert rates_for(TOY) is None
    assert rates_for(device_by_name("jetson-thor")) is None
    rates = rates_for(device_by_name("h200"))
    assert rates is not None
    assert rates.hbm == pytest.approx(4.32e12)
    assert rates.l2 == pytest.approx(7.06e12, rel=1e-3)


def test_the_instruction_count_follows_the_compiler(compiler_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fusedq_kernels.audit", "--json", "--tile", "16x128"]
    options = ["--weight-type", "uint4b8", "nf4", "--act-dtype", "bf16"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=compiler_env, check=True
    )
    rows = json.loads(done.stdout)["fused"]
    assert len(rows) == 2
    for row in rows:
        spec = QuantSpec(WeightType(row["weight_type"]), 128, torch.float16)
        predicted = instructions_per_weight(spec, TileConfig(**row["tile"]), 1 << 16)
        assert predicted == pytest.approx(row["instructions_per_weight"], rel=0.25)
